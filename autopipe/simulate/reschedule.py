"""A plan under another schedule, or under the fastest: its simulated times and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from autopipe.errors import ScheduleError
from autopipe.plan import Plan
from autopipe.schedule import build_schedule
from autopipe.schedule.kinds import KINDS, TRIED
from autopipe.simulate.plans import plan_costs, plan_schedule
from autopipe.simulate.play import count_live, simulate_schedule

ALIKE = 2e-3
"""Schedules count as equally fast within this share of a step."""


def schedules_for(num_stages: int, num_ranks: int, among: Sequence[str] = TRIED) -> tuple[str, ...]:
    """The schedules that can run these stages on these ranks, simplest first."""
    return tuple(name for name in among if KINDS[name].has_backward and KINDS[name].fits(num_stages, num_ranks))


def fastest_schedule(plan: Plan, *, num_ranks: int | None = None, schedules: Sequence[str] | None = None) -> Plan:
    """The plan under the schedule with the shortest simulated step, of those whose memory is within the plan's limit.

    If none is within it, the one that needs least memory is taken. Cuts, recompute and link stay as they are.

    Args:
        num_ranks: ranks over which the stages are dealt; None: the plan's.
        schedules: to choose from; None: those that the engine can run.

    Raises:
        ScheduleError: no schedule deals these stages over these ranks.
    """
    ranks = num_ranks or plan.num_ranks or plan.num_stages
    names = schedules_for(plan.num_stages, ranks) if schedules is None else schedules
    if not names:
        raise ScheduleError(
            f"no schedule for {plan.num_stages} stages on {ranks} ranks",
            expected="at least as many stages as ranks",
            remedy="use as many stages as ranks, or a multiple of them",
        )
    found = [(rescheduled(plan, name, num_ranks=ranks), i) for i, name in enumerate(names)]
    peaks = {i: max(rank_peak_bytes(p)) for p, i in found}
    fitting = [(p, i) for p, i in found if within_memory(p)]
    if not fitting:
        return min(found, key=lambda f: (peaks[f[1]], f[1]))[0]
    shortest = min(p.step_us for p, _ in fitting)
    return next(p for p, _ in fitting if p.step_us <= shortest * (1 + ALIKE))


def rescheduled(plan: Plan, schedule: str, *, num_ranks: int | None = None) -> Plan:
    """The same stages under another schedule: its simulated step and bubble, and the activations that it keeps alive.

    The bounds of the plan hold for its own schedule; under another they are left out.

    Raises:
        ScheduleError: the schedule cannot deal these stages over these ranks.
    """
    ranks = num_ranks or plan.num_ranks or plan.num_stages
    dealt = ranks if KINDS[schedule].several_stages_a_rank else 0
    if (schedule, dealt) == (plan.schedule, plan.num_ranks):
        return plan
    before, after = _live(plan, plan.schedule, plan.num_ranks), _live(plan, schedule, ranks)
    stages = []
    for stage, old, new in zip(plan.stages, before, after, strict=True):
        activations = stage.activation_bytes // old * new
        peak = stage.peak_bytes - stage.activation_bytes + activations
        stages.append(dataclasses.replace(stage, activation_bytes=activations, peak_bytes=peak, expected_peak_bytes=0))
    timeline = simulate_schedule(
        plan_schedule(plan, schedule=schedule, num_ranks=ranks), plan_costs(plan, num_ranks=ranks)
    )
    unknown: dict[str, Any] = {"lower_bound_us": 0.0, "proved": False}
    return dataclasses.replace(
        plan,
        stages=tuple(stages),
        schedule=schedule,
        num_ranks=dealt,
        step_us=timeline.makespan_us,
        bubble=bubble_of(plan, ranks, timeline.makespan_us),
        **unknown,
    )


def within_memory(plan: Plan) -> bool:
    """Return whether each rank's peak is within the memory of its device, as far as that is known."""
    limits = [stage.memory_limit_bytes or plan.memory_limit_bytes for stage in plan.stages]
    return not any(limits) or all(
        not limit or peak <= limit for peak, limit in zip(rank_peak_bytes(plan), limits, strict=False)
    )


def rank_peak_bytes(plan: Plan) -> tuple[int, ...]:
    """The most memory that each rank holds: what its stages hold all the time, and the activations alive at once."""
    return simulate_schedule(plan_schedule(plan), plan_costs(plan)).peak_bytes


def bubble_of(plan: Plan, num_ranks: int, step_us: float) -> float:
    """The share of the ranks' time in a step of this length in which they do not compute."""
    busy = plan.num_microbatches * sum(stage.forward_us + stage.backward_us for stage in plan.stages)
    return min(max(1 - busy / (num_ranks * step_us), 0.0), 1.0) if step_us else 0.0


def _live(plan: Plan, schedule: str, num_ranks: int) -> tuple[int, ...]:
    """Micro-batches whose activations each stage keeps alive at once."""
    return count_live(build_schedule(schedule, plan.num_stages, plan.num_microbatches, [], num_ranks=num_ranks or None))
