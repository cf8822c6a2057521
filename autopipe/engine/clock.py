"""When each action of a step ran on this rank: host time on a CPU, device events on CUDA, both counted from the start of the step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from autopipe.engine.watcher import Watcher
from autopipe.schedule import Action


@dataclass(frozen=True, slots=True)
class Span:
    """An action, or the wait before it, in microseconds from the start of the step."""

    action: Action
    waiting: bool
    start_us: float
    end_us: float


class StepClock:
    """Collects the spans of one step. `started_ns` is on the host's monotonic clock, which the ranks of one host share.

    `allocated_bytes` is the most memory beyond what was there at its start, 0 where that was not counted.
    """

    def __init__(self, device: torch.device, watcher: Watcher) -> None:
        self._device, self._watcher = device, watcher
        self._marks: list[tuple[Action, bool, Any, Any]] = []
        self.allocated_bytes = 0
        self.started_ns = time.monotonic_ns()
        self._zero = self._now()

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.monotonic_ns()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextlib.contextmanager
    def span(self, action: Action, *, waiting: bool = False) -> Iterator[None]:
        """Times what runs inside, and lets the watcher know of it."""
        self._watcher.enter(action, waiting)
        start = self._now()
        yield
        self._marks.append((action, waiting, start, self._now()))

    def spans(self) -> list[Span]:
        """All spans so far; on CUDA it waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [Span(action, waiting, self._since(a), self._since(b)) for action, waiting, a, b in self._marks]

    def _since(self, mark: Any) -> float:
        if self._device.type == "cuda":
            return float(self._zero.elapsed_time(mark)) * 1e3
        return float(mark - self._zero) / 1e3
