"""Report of a plan: a row for each stage, the figures of the step, the usual splits for comparison, an explanation."""

from __future__ import annotations

import math

from autopipe.plan import Plan, StagePlan
from autopipe.report.candidates import candidate_table, why
from autopipe.report.explain import explain
from autopipe.report.tables import Cell, Column, Table, readable
from autopipe.simulate import plan_costs
from autopipe.units import MIB

WHOLE_MODEL = "(model)"
STAGE_COLUMNS = (
    Column(name="stage"),
    Column(name="modules"),
    Column(name="nodes"),
    Column(name="parameters"),
    Column(name="parameter MiB", decimals=1),
    Column(name="gradient MiB", decimals=1),
    Column(name="optimizer MiB", decimals=1),
    Column(name="activation MiB", decimals=1),
    Column(name="peak MiB", decimals=1),
    Column(name="% of limit", decimals=1),
    Column(name="forward ms", decimals=2),
    Column(name="backward ms", decimals=2),
    Column(name="nodes run again"),
    Column(name="send MiB", decimals=2),
    Column(name="load %"),
)
SPLIT_COLUMNS = (
    Column(name="split"),
    Column(name="step ms", decimals=2),
    Column(name="against this plan"),
    Column(name="imbalance %", decimals=1),
    Column(name="bubble %", decimals=1),
    Column(name="peak MiB", decimals=1),
    Column(name="fits"),
)


def plan_parts(plan: Plan) -> tuple[Table | str, ...]:
    """The tables and sentences of the report."""
    parts: list[Table | str] = [stage_table(plan), _summary(plan)]
    if plan.baselines:
        parts.append(split_table(plan))
    if plan.candidates:
        parts += [candidate_table(plan), why(plan)]
    return (*parts, explain(plan))


def loads(plan: Plan) -> list[float]:
    """Each stage's time for a micro-batch, transfers that are not hidden included, as a share of the slowest
    stage's."""
    costs = plan_costs(plan)
    times = [f + b for f, b in zip(costs.forward_us, costs.backward_us, strict=True)]
    return [t / max(times) if max(times) else 0.0 for t in times]


def samples_per_s(plan: Plan) -> float | None:
    """Samples trained in a second, the optimizer apart; None if the step takes no time."""
    samples = plan.microbatch_size * plan.num_microbatches * plan.data_parallel
    return samples / plan.step_us * 1e6 if plan.step_us else None


def plan_figures(plan: Plan) -> dict[str, object]:
    """The figures that the report adds to a plan."""
    return {
        "load": loads(plan),
        "samples_per_s": samples_per_s(plan),
        "gap": gap_of(plan),
        "explanation": explain(plan),
    }


def gap_of(plan: Plan) -> float | None:
    """Gap between the step and the lower bound, as a share of the bound."""
    return plan.step_us / plan.lower_bound_us - 1 if plan.lower_bound_us else None


def plan_title(plan: Plan) -> str:
    """Summary of the plan in one line."""
    replicas = f", {plan.data_parallel} replicas" if plan.data_parallel > 1 else ""
    estimated = " (estimated costs)" if plan.estimated else ""
    return (
        f"Plan {plan.plan_hash}: {plan.num_stages} stages{replicas}, {plan.num_microbatches} micro-batches of "
        f"{plan.microbatch_size} samples, {plan.schedule}, on {plan.device}{estimated}"
    )


def modules(stage: StagePlan) -> str:
    """The first and last module of a stage; what the model computes outside of its submodules is `(model)`."""
    first, last = stage.first_module or WHOLE_MODEL, stage.last_module or WHOLE_MODEL
    return first if first == last else f"{first} … {last}"


def stage_table(plan: Plan) -> Table:
    """A row for each stage."""
    rows: list[tuple[Cell, ...]] = []
    for stage, load in zip(plan.stages, loads(plan), strict=True):
        limit = 100 * stage.peak_bytes / plan.memory_limit_bytes if plan.memory_limit_bytes else None
        rows.append(
            (
                stage.index,
                modules(stage),
                len(stage.nodes),
                len(stage.params),
                stage.param_bytes / MIB,
                stage.gradient_bytes / MIB,
                stage.optimizer_bytes / MIB,
                stage.activation_bytes / MIB,
                stage.peak_bytes / MIB,
                limit,
                stage.forward_us / 1e3,
                stage.backward_us / 1e3,
                sum(map(len, stage.recompute)) or None,
                stage.send_bytes / MIB,
                100 * load,
            )
        )
    return readable(Table(title="", columns=STAGE_COLUMNS, rows=tuple(rows)))


def _summary(plan: Plan) -> str:
    gap, rate = gap_of(plan), samples_per_s(plan)
    lines = [
        f"imbalance {plan.imbalance:.1%} (slowest stage over the mean), bubble {plan.bubble:.1%} (time in which "
        "devices do not compute)",
        f"step time {plan.step_us / 1e3:,.2f} ms without the optimizer" + (f", {rate:,.1f} samples/s" if rate else ""),
    ]
    if gap is not None:
        lines.append(
            f"lower bound {plan.lower_bound_us / 1e3:,.2f} ms, gap {gap:.1%}: no cut into {plan.num_stages} stages "
            "is faster than the bound"
        )
    if plan.num_stages > 1:
        lines.append(link_words(plan))
    if any(WHOLE_MODEL in modules(stage) for stage in plan.stages):
        lines.append(f"{WHOLE_MODEL}: what the model's own forward computes, outside of its submodules")
    return "\n".join(lines)


def link_words(plan: Plan) -> str:
    """The link between stages that the plan counts with."""
    speed = "free" if math.isinf(plan.link.bytes_per_us) else f"{plan.link.bytes_per_us / 125:,.4g} Gbit/s"
    link = f"{plan.link.latency_us:g} us + {speed}, {plan.link.overlap:.0%} hidden behind compute"
    return f"links {link}{'' if plan.link.measured else ' (assumed, not measured)'}"


def split_table(plan: Plan) -> Table:
    """Table of the plan and the splits that one would otherwise make."""
    limit = plan.memory_limit_bytes

    def row(name: str, step_us: float, imbalance: float, bubble: float, peak_bytes: int) -> tuple[Cell, ...]:
        against = f"{step_us / plan.step_us - 1:+.1%}" if plan.step_us else "-"
        fits = None if not limit else "yes" if peak_bytes <= limit else "no"
        return (name, step_us / 1e3, against, 100 * imbalance, 100 * bubble, peak_bytes / MIB, fits)

    peak = max(stage.peak_bytes for stage in plan.stages)
    rows = [row("this plan", plan.step_us, plan.imbalance, plan.bubble, peak)]
    rows += [row(b.name, b.step_us, b.imbalance, b.bubble, b.peak_bytes) for b in plan.baselines]
    return readable(Table(title="The splits that one would otherwise make", columns=SPLIT_COLUMNS, rows=tuple(rows)))
