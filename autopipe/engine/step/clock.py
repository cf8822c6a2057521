"""The times of a step's actions on this rank, from the start of the step: host time on a CPU, else device events."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from autopipe.engine.failures.monitor import RankMonitor
from autopipe.schedule import Action
from profiler import accelerator

RUN_AHEAD = 8
"""Spans that the host may queue ahead of the device: two micro-batches' worth."""


@dataclass(frozen=True, slots=True)
class Span:
    """An action, or the wait before it, in microseconds from the start of the step."""

    action: Action
    waiting: bool
    start_us: float
    end_us: float


class StepClock:
    """Collects the spans of one step. `started_ns` is on the host's monotonic clock, which the ranks of one host share.

    `allocated_bytes` is the most memory beyond what was there at its start; 0: not counted.
    """

    def __init__(self, device: torch.device, monitor: RankMonitor) -> None:
        self._device, self._has_events, self.monitor = device, accelerator.is_accelerator(device), monitor
        self.marks: list[tuple[Action, bool, Any, Any]] = []
        self.allocated_bytes = 0
        self.started_ns = time.monotonic_ns()
        self._zero = self.now()

    def now(self) -> Any:
        if not self._has_events:
            return time.monotonic_ns()
        return accelerator.timing_event(self._device)

    def hold(self) -> None:
        """Keep the host at most `RUN_AHEAD` spans ahead of the device.

        Memory that the device still reads cannot be used again: without a bound, buffers would grow with the number of
        micro-batches. It waits for a span that comes earlier in the one order of all ranks, so it cannot deadlock.
        """
        if self._has_events and len(self.marks) >= RUN_AHEAD:
            self.marks[-RUN_AHEAD][3].synchronize()

    def span(self, action: Action, *, waiting: bool = False) -> _Timed:
        """Time what runs inside, and tell the monitor of it."""
        return _Timed(self, action, waiting)

    def spans(self) -> list[Span]:
        """All spans so far; on an accelerator it waits for the device."""
        if self._has_events:
            accelerator.synchronize(self._device)
        return [Span(action, waiting, self._since(a), self._since(b)) for action, waiting, a, b in self.marks]

    def _since(self, mark: Any) -> float:
        if self._has_events:
            return float(self._zero.elapsed_time(mark)) * 1e3
        return float(mark - self._zero) / 1e3


class _Timed:
    """A context manager written out: a step has many, and a generator takes three times as long."""

    __slots__ = ("_action", "_clock", "_start", "_waiting")

    def __init__(self, clock: StepClock, action: Action, waiting: bool) -> None:
        self._clock, self._action, self._waiting = clock, action, waiting

    def __enter__(self) -> None:
        self._clock.monitor.enter(self._action, self._waiting)
        self._clock.hold()
        self._start = self._clock.now()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._clock.marks.append((self._action, self._waiting, self._start, self._clock.now()))
