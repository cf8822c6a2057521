"""Compare the predicted figures of a plan with the measured ones, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopipe.plan import Plan
from autopipe.report.plans import modules
from autopipe.report.tables import Cell, Column, Table
from autopipe.schedule import Costs
from autopipe.simulate import plan_costs
from autopipe.units import MIB

COLUMNS = (
    Column(name="stage"),
    Column(name="modules"),
    Column(name="forward predicted ms", decimals=2),
    Column(name="measured ms", decimals=2),
    Column(name="backward predicted ms", decimals=2),
    Column(name="measured ms", decimals=2),
    Column(name="compute error %", decimals=1),
    Column(name="transfer predicted ms", decimals=1),
    Column(name="measured ms", decimals=1),
    Column(name="idle predicted ms", decimals=1),
    Column(name="measured ms", decimals=1),
    Column(name="peak predicted MiB", decimals=1),
    Column(name="measured MiB", decimals=1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStage:
    """Medians over training steps, in microseconds: one forward, one backward, all waits of a step, the whole step;
    bytes at the peak.

    `transfer_us` is the part of the waits of the last step in which a message was under way; the rest was idle.
    `peak_bytes` is 0 if it is not known: on a CPU unless AUTOPIPE_COUNT_MEMORY=1, and there for several stages on a
    rank.
    """

    index: int
    num_steps: int
    forward_us: float
    backward_us: float
    waiting_us: float
    step_us: float
    peak_bytes: int
    transfer_us: float = 0.0


def measured_parts(plan: Plan, measured: Sequence[MeasuredStage]) -> tuple[Table | str, ...]:
    """A table with a row for each stage that was measured, and the figures of the step."""
    return _table(plan, measured), _summary(plan, measured)


def measured_title(plan: Plan, measured: Sequence[MeasuredStage]) -> str:
    """Title: the plan and the number of steps."""
    of = f"{plan.num_stages} stages, {plan.num_microbatches} micro-batches, median of {measured[0].num_steps} steps"
    return f"Predicted and measured: {of}"


def _table(plan: Plan, measured: Sequence[MeasuredStage]) -> Table:
    costs, took_us = plan_costs(plan), max(s.step_us for s in measured)
    rows: list[tuple[Cell, ...]] = []
    for stage in measured:
        planned = plan.stages[stage.index]
        exposed = _exposed_us(plan, costs, stage.index)
        idle = plan.step_us - plan.num_microbatches * (planned.forward_us + planned.backward_us) - exposed
        waited = took_us - plan.num_microbatches * (stage.forward_us + stage.backward_us) - stage.transfer_us
        expected = planned.expected_peak_bytes or planned.peak_bytes
        predicted, took = planned.forward_us + planned.backward_us, stage.forward_us + stage.backward_us
        rows.append(
            (
                stage.index,
                modules(planned),
                planned.forward_us / 1e3,
                stage.forward_us / 1e3,
                planned.backward_us / 1e3,
                stage.backward_us / 1e3,
                100 * (predicted / took - 1),
                exposed / 1e3,
                stage.transfer_us / 1e3,
                max(idle, 0.0) / 1e3,
                max(waited, 0.0) / 1e3,
                expected / MIB,
                stage.peak_bytes / MIB if stage.peak_bytes else None,
            )
        )
    return Table(title="", columns=COLUMNS, rows=tuple(rows))


def _exposed_us(plan: Plan, costs: Costs, stage: int) -> float:
    """The time of a step that a stage is expected to spend on transfers which no compute hides."""
    planned = plan.stages[stage]
    busy = costs.forward_us[stage] + costs.backward_us[stage]
    return plan.num_microbatches * max(busy - planned.forward_us - planned.backward_us, 0.0)


def _summary(plan: Plan, measured: Sequence[MeasuredStage]) -> str:
    took = max(s.step_us for s in measured)
    busy = [plan.num_microbatches * (s.forward_us + s.backward_us) for s in measured]
    bubble = 1 - sum(busy) / (len(busy) * took)
    assumed = "" if plan.link.measured else "; the link was assumed, not measured"
    hidden = plan_costs(plan)
    load = max(f + b for f, b in zip(hidden.forward_us, hidden.backward_us, strict=True))
    return (
        f"step without the optimizer: predicted {plan.step_us / 1e3:.1f} ms, measured {took / 1e3:.1f} ms "
        f"({100 * (plan.step_us / took - 1):+.0f} %{assumed})\n"
        f"bubble: predicted {100 * plan.bubble:.1f} %, measured {100 * bubble:.1f} %\n"
        f"slowest stage: predicted {load / 1e3:.2f} ms a micro-batch, measured "
        f"{max(s.forward_us + s.backward_us for s in measured) / 1e3:.2f} ms"
    )
