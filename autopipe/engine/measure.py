"""What training steps took on this rank, summed up for the report and merged over the ranks for the trace."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

import torch

from autopipe.engine.clock import Span, StepClock
from autopipe.engine.stage_run import Step
from autopipe.report.measured import MeasuredStage
from autopipe.simulate import Event, Timeline

KEPT_STEPS = 50


class Measurements:
    """The last training steps of this rank."""

    def __init__(self) -> None:
        self._steps: deque[StepClock] = deque(maxlen=KEPT_STEPS)
        self._stages: Sequence[int] = ()
        self._count = 0

    def add(self, step: Step, stages: Sequence[int]) -> None:
        """Keeps a step; the first, which warms everything up, is left out."""
        self._count += 1
        self._stages = stages
        if self._count > 1 and step.microbatches:
            self._steps.append(step.clock)

    def summaries(self, device: torch.device) -> list[MeasuredStage]:
        """Medians over the kept steps for each stage of this rank; none before the second step."""
        steps = [clock.spans() for clock in self._steps]
        return [self._summary(s, steps, device) for s in self._stages] if steps else []

    def _summary(self, stage: int, steps: list[list[Span]], device: torch.device) -> MeasuredStage:
        own = [[s for s in spans if s.action.stage == stage] for spans in steps]
        return MeasuredStage(
            index=stage,
            num_steps=len(steps),
            forward_us=statistics.median(s.end_us - s.start_us for spans in own for s in spans if _is(s, "F")),
            backward_us=statistics.median(s.end_us - s.start_us for spans in own for s in spans if _is(s, "B")),
            waiting_us=statistics.median(sum(s.end_us - s.start_us for s in spans if s.waiting) for spans in own),
            step_us=statistics.median(max(s.end_us for s in spans) for spans in steps),
            peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        )

    def last_step(self) -> tuple[int, list[Span]] | None:
        """The start on the host's clock in nanoseconds, and the spans of the last step."""
        if not self._steps:
            return None
        return self._steps[-1].started_ns, self._steps[-1].spans()


def _is(span: Span, kind: str) -> bool:
    return span.action.kind == kind and not span.waiting


def merge_timelines(ranks: Sequence[tuple[int, list[Span]] | None]) -> Timeline:
    """One timeline from the last step of every rank, on the clock that the ranks of one host share."""
    steps = [r for r in ranks if r is not None]
    zero = min((started for started, _ in steps), default=0)
    events, busy = [], []
    for rank, (started, spans) in enumerate(steps):
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
