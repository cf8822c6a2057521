"""Timing on a device: a clock that waits for the device, and a median with its confidence interval."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from profiler import accelerator


class Clock(Protocol):
    """Marks moments in the stream of work of a device."""

    def mark(self) -> Any:
        """A moment: all work given to the device so far comes before it."""

    def elapsed_us(self, start: Any, end: Any) -> float:
        """Microseconds between two moments; waits until the device has reached both."""


class HostClock:
    """`perf_counter_ns`: the time that passes on the host."""

    def mark(self) -> int:
        return time.perf_counter_ns()

    def elapsed_us(self, start: int, end: int) -> float:
        return (end - start) / 1e3


class ThreadClock:
    """The time that this thread ran on the CPU: what other processes took is not in it. For work of one thread."""

    def mark(self) -> int:
        return time.thread_time_ns()

    def elapsed_us(self, start: int, end: int) -> float:
        return (end - start) / 1e3


class EventClock:
    """Events on the current stream of an accelerator, so that the host's wait is not part of the time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        return accelerator.timing_event(self._device)

    def elapsed_us(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock of a device: events on an accelerator; on a CPU the time of torch's only thread, or the host's
    counter."""
    if accelerator.is_accelerator(device):
        return EventClock(device)
    return ThreadClock() if device.type == "cpu" and torch.get_num_threads() == 1 else HostClock()


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """The median and the relative half-width of its 95 % confidence interval.

    The interval lies between two order statistics (ranks n/2 ± 0.98·√n, from the binomial distribution), so that no
    shape of the distribution is assumed: times have a long right tail. Below six samples it is the whole range.
    Method: Hoefler and Belli, "Scientific Benchmarking of Parallel Computing Systems", SC 2015, rule 5.
    """
    ordered = sorted(samples)
    n = len(ordered)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    reach = 0.98 * math.sqrt(n)
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    width = (ordered[high] - ordered[low]) / 2
    return middle, width / middle if middle > 0 else 0.0
