"""Explain a plan in one or two sentences: what slows the step, by how much, and what would help most."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass

from autopipe.plan import FREE_LINK, Plan
from autopipe.simulate import simulate
from autopipe.units import MIB

WORTH_SAYING = 0.02
"""A saving below this share of the step is noise of the cost model, and is not mentioned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change of the plan that was simulated.

    Attributes:
        cause: what slows the step.
        advice: what to change.
        saving: the share of the time of a sample that the change saves.
    """

    cause: str
    advice: str
    saving: float


def explain(plan: Plan) -> str:
    """Explain what slows the step and what would help most, from simulations of the plan with one thing changed."""
    sentences = [warning] if (warning := _memory_warning(plan)) else []
    found = remedies(plan)
    if plan.num_stages == 1:
        sentences.append("One stage: nothing is sent and nothing waits.")
    elif not found or found[0].saving < WORTH_SAYING:
        sentences.append(
            "Nothing simple would make this step more than 2% faster: its stages are even and seldom wait."
        )
    else:
        sentences.append(f"{found[0].cause} {found[0].advice}")
        if len(found) > 1 and found[1].saving >= WORTH_SAYING:
            sentences.append(f"Next: {found[1].cause[0].lower()}{found[1].cause[1:]} {found[1].advice}")
    return " ".join(sentences)


def remedies(plan: Plan) -> list[Remedy]:
    """Possible changes, the most helpful first."""
    if plan.num_stages == 1:
        return []
    found = [_more_microbatches(plan), _even_stages(plan), _free_links(plan)]
    return sorted(found, key=lambda remedy: -remedy.saving)


def _saving(plan: Plan, changed: Plan) -> float:
    """The share of the time of a sample that a changed plan saves."""
    now, then = (
        simulate(plan).makespan_us / plan.num_microbatches,
        simulate(changed).makespan_us / changed.num_microbatches,
    )
    return 1 - then / now if now else 0.0


def _more_microbatches(plan: Plan) -> Remedy:
    changed = dataclasses.replace(plan, num_microbatches=2 * plan.num_microbatches)
    saving = _saving(plan, changed)
    return Remedy(
        cause=f"Filling and draining the pipeline holds the step back: devices do not compute for {plan.bubble:.0%} "
        "of it.",
        advice=f"{changed.num_microbatches} micro-batches of the same size in place of {plan.num_microbatches} "
        f"would take {saving:.0%} less time a sample (simulated).",
        saving=saving,
    )


def _even_stages(plan: Plan) -> Remedy:
    forward = statistics.fmean(stage.forward_us for stage in plan.stages)
    backward = statistics.fmean(stage.backward_us for stage in plan.stages)
    even = tuple(dataclasses.replace(stage, forward_us=forward, backward_us=backward) for stage in plan.stages)
    saving = _saving(plan, dataclasses.replace(plan, stages=even))
    slowest = max(plan.stages, key=lambda stage: stage.forward_us + stage.backward_us)
    over = (slowest.forward_us + slowest.backward_us) / (forward + backward) - 1 if forward + backward else 0.0
    return Remedy(
        cause=f"Stage {slowest.index} computes {over:.0%} longer than the mean stage.",
        advice=f"Stages of equal time would take {saving:.0%} less (simulated): "
        "split its largest module into smaller ones, or use another number of stages.",
        saving=saving,
    )


def _free_links(plan: Plan) -> Remedy:
    saving = _saving(plan, dataclasses.replace(plan, link=FREE_LINK))
    megabytes = sum(t.forward_bytes + t.backward_bytes for t in plan.transfers) / MIB
    return Remedy(
        cause=f"Transfers hold the step back: {megabytes:,.1f} MiB cross between stages for each micro-batch.",
        advice=f"Free links would take {saving:.0%} less time (simulated): use a faster link, a lower precision, "
        "or fewer stages.",
        saving=saving,
    )


def _memory_warning(plan: Plan) -> str:
    if not plan.memory_limit_bytes:
        return ""
    worst = max(plan.stages, key=lambda stage: stage.peak_bytes)
    if worst.peak_bytes <= plan.memory_limit_bytes:
        return ""
    return (
        f"Stage {worst.index} needs {worst.peak_bytes / MIB:,.0f} MiB, more than the limit of "
        f"{plan.memory_limit_bytes / MIB:,.0f} MiB: use more stages or smaller micro-batches."
    )
