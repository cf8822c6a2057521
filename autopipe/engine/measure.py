"""What training steps took on this rank, summed up for the report and merged over the ranks for the trace."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

import torch

from autopipe.engine.clock import Span, StepClock
from autopipe.engine.stage_run import StageRun
from autopipe.report.measured import MeasuredStage
from autopipe.simulate import Event, Timeline

KEPT_STEPS = 50


class Measurements:
    """The last training steps of this rank."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, StepClock]] = deque(maxlen=KEPT_STEPS)
        self._count = 0

    def add(self, run: StageRun) -> None:
        """Keeps a step; the first, which warms everything up, is left out."""
        self._count += 1
        if self._count > 1:
            self._steps.append((run.stage, run.clock))

    def summary(self, device: torch.device) -> MeasuredStage | None:
        """Medians over the kept steps; None before the second step."""
        if not self._steps:
            return None
        steps = [clock.spans() for _, clock in self._steps]
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return MeasuredStage(
            index=self._steps[0][0],
            num_steps=len(steps),
            forward_us=statistics.median(s.end_us - s.start_us for spans in steps for s in spans if _is(s, "F")),
            backward_us=statistics.median(s.end_us - s.start_us for spans in steps for s in spans if _is(s, "B")),
            waiting_us=statistics.median(sum(s.end_us - s.start_us for s in spans if s.waiting) for spans in steps),
            step_us=statistics.median(max(s.end_us for s in spans) for spans in steps),
            peak_bytes=peak,
        )

    def last_step(self) -> tuple[int, int, list[Span]] | None:
        """The stage, the start on the host's clock in nanoseconds, and the spans of the last step."""
        if not self._steps:
            return None
        stage, clock = self._steps[-1]
        return stage, clock.started_ns, clock.spans()


def _is(span: Span, kind: str) -> bool:
    return span.action.kind == kind and not span.waiting


def merge_timelines(ranks: Sequence[tuple[int, int, list[Span]] | None]) -> Timeline:
    """One timeline from the last step of every rank, on the clock that the ranks of one host share."""
    steps = [r for r in ranks if r is not None]
    zero = min((started for _, started, _ in steps), default=0)
    events, busy = [], []
    for rank, (_, started, spans) in enumerate(steps):
        shift = (started - zero) / 1e3
        computes = [s for s in spans if not s.waiting]
        busy.append(sum(s.end_us - s.start_us for s in computes))
        events += [
            Event(rank, s.action.kind, s.action.stage, s.action.microbatch, -1, s.start_us + shift, s.end_us + shift)
            for s in computes
        ]
    events.sort(key=lambda e: e.start_us)
    makespan = max((e.end_us for e in events), default=0.0)
    bubble = tuple(1 - b / makespan for b in busy)
    return Timeline(events=tuple(events), makespan_us=makespan, bubble=bubble, peak_bytes=(0,) * len(busy))
