"""Times of training steps on this rank, summed up for the report and merged over the ranks for the trace."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence

import torch

from autopipe.engine.failures.stragglers import Pace
from autopipe.engine.step.clock import Span, StepClock
from autopipe.engine.step.stage_executor import Step
from autopipe.plan import Plan
from autopipe.report.measured import MeasuredStage
from autopipe.schedule import Action
from autopipe.simulate import Event, Timeline
from profiler import accelerator

KEPT_STEPS = 50
PACED_STEPS, PACE_EVERY_S = 5, 5.0


class Measurements:
    """The last training steps of this rank."""

    def __init__(self) -> None:
        self._steps: deque[StepClock] = deque(maxlen=KEPT_STEPS)
        self._stages: Sequence[int] = ()
        self._count = 0
        self._allocated_bytes = 0
        self._paced_s = 0.0

    def add(self, step: Step, stages: Sequence[int]) -> None:
        """Keep a step; the first, which warms everything up, is left out."""
        self._count += 1
        self._stages = stages
        self._allocated_bytes = max(self._allocated_bytes, step.clock.allocated_bytes)
        if self._count > 1 and step.microbatches:
            self._steps.append(step.clock)

    def summaries(self, device: torch.device, held_bytes: int) -> list[MeasuredStage]:
        """Medians over the kept steps for each stage of this rank; none before the second step.

        Args:
            held_bytes: parameters, buffers and optimizer state of this rank.
        """
        steps = [clock.spans() for clock in self._steps]
        peak = accelerator.peak_bytes(device) if accelerator.is_accelerator(device) else 0
        if self._allocated_bytes and len(self._stages) == 1:
            peak = held_bytes + self._allocated_bytes
        return [_summary(s, steps, peak) for s in self._stages] if steps else []

    def paces(self, plan: Plan) -> list[Pace]:
        """Time of a micro-batch on this rank's stages over the last steps, with the planned one; empty if not due.

        It is due every `PACE_EVERY_S` seconds, since on CUDA it waits for the device.
        """
        now = time.monotonic()
        if now - self._paced_s < PACE_EVERY_S or len(self._steps) < PACED_STEPS:
            return []
        self._paced_s = now
        computes = [s for clock in list(self._steps)[-PACED_STEPS:] for s in clock.spans() if not s.waiting]
        return [
            Pace(
                stage=stage,
                measured_us=sum(s.end_us - s.start_us for s in computes if s.action.stage == stage)
                / max(1, sum(s.action.stage == stage and s.action.kind == "F" for s in computes)),
                planned_us=plan.stages[stage].forward_us + plan.stages[stage].backward_us,
            )
            for stage in self._stages
        ]

    def last_step(self) -> tuple[int, list[Span]] | None:
        """The start on the host's clock in nanoseconds, and the spans of the last step."""
        if not self._steps:
            return None
        return self._steps[-1].started_ns, self._steps[-1].spans()


def _summary(stage: int, steps: list[list[Span]], peak_bytes: int) -> MeasuredStage:
    own = [[s for s in spans if s.action.stage == stage] for spans in steps]
    return MeasuredStage(
        index=stage,
        num_steps=len(steps),
        forward_us=statistics.median(t for spans in own for t in _times(spans, ("F",))),
        backward_us=statistics.median(t for spans in own for t in _times(spans, ("B", "I", "W"))),
        waiting_us=statistics.median(sum(s.end_us - s.start_us for s in spans if s.waiting) for spans in own),
        step_us=statistics.median(max(s.end_us for s in spans) for spans in steps),
        peak_bytes=peak_bytes,
    )


def _times(spans: Sequence[Span], kinds: tuple[str, ...]) -> list[float]:
    """The time of each micro-batch in computes of these kinds: a backward may come in two parts."""
    found: dict[int, float] = {}
    for s in spans:
        if not s.waiting and s.action.kind in kinds:
            found[s.action.microbatch] = found.get(s.action.microbatch, 0.0) + s.end_us - s.start_us
    return list(found.values())


def transfer_times_us(ranks: Sequence[tuple[int, list[Span]] | None]) -> dict[int, float]:
    """For each stage, how long it waited in the last step for messages that were already under way.

    A wait is idle time until the sender has computed the message, and transfer time from then on. The ranks of one host
    share their clock, so the two can be told apart.
    """
    steps = [r for r in ranks if r is not None]
    made: dict[tuple[str, int, int], float] = {}
    waits: list[tuple[str, Action, float, float]] = []
    for started, spans in steps:
        for s in spans:
            start, end = started / 1e3 + s.start_us, started / 1e3 + s.end_us
            if s.waiting:
                waits.append(("F" if s.action.kind == "RECV_F" else "B", s.action, start, end))
            elif s.action.kind in ("F", "B", "I"):
                made["F" if s.action.kind == "F" else "B", s.action.stage, s.action.microbatch] = end
    found: dict[int, float] = {}
    for phase, action, start, end in waits:
        ready = max(start, made.get((phase, action.peer, action.microbatch), start))
        found[action.stage] = found.get(action.stage, 0.0) + max(0.0, end - ready)
    return found


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
