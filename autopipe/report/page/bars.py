"""Bars of a plan: the load of each stage as a share of the slowest, and its memory by part against the limit."""

from __future__ import annotations

import html

from autopipe.plan import Plan, StagePlan
from autopipe.report.plans import modules
from autopipe.simulate import plan_costs
from autopipe.units import MIB

MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations", "workspace")
GOLDEN_ANGLE = 137.5


def stage_colours(num_stages: int) -> str:
    """CSS: a colour for each stage, far from its neighbours'."""
    return "".join(f".s{k}{{--hue:{(212 + GOLDEN_ANGLE * k) % 360:.0f}}}" for k in range(num_stages))


def load_bars(plan: Plan) -> str:
    """A row for each stage: forward, backward, and unhidden transfers, as shares of the slowest stage's time."""
    costs = plan_costs(plan)
    loads = [f + b for f, b in zip(costs.forward_us, costs.backward_us, strict=True)]
    slowest = max(loads) or 1.0
    rows = []
    for stage, load in zip(plan.stages, loads, strict=True):
        sent = max(load - stage.forward_us - stage.backward_us, 0.0)
        parts = [("forward", stage.forward_us), ("backward", stage.backward_us), ("transfers", sent)]
        spans = "".join(
            _span(name, 100 * us / slowest, f"stage {stage.index}, {name}: {us / 1e3:,.3f} ms")
            for name, us in parts
            if us
        )
        rows.append(_row(stage, spans, f"{load / 1e3:,.2f} ms", f"{load / slowest:.0%}"))
    legend = "Time of one micro-batch: forward in full colour, backward pale"
    legend += ", transfers that compute does not hide in grey." if any(t.forward_bytes for t in plan.transfers) else "."
    return f'<p class="legend">{legend}</p>\n<div class="bars">\n{"".join(rows)}</div>'


def memory_bars(plan: Plan) -> str:
    """A row for each stage: the parts of its peak, and the limit, if any, as a line through all."""
    limit = plan.memory_limit_bytes
    full = max(limit, *(stage.peak_bytes for stage in plan.stages)) or 1
    rows = []
    for stage in plan.stages:
        spans = "".join(
            _span(f"m{i}", 100 * size / full, f"stage {stage.index}, {name}: {size / MIB:,.1f} MiB")
            for i, (name, size) in enumerate(zip(MEMORY_PARTS, memory_parts(stage), strict=True))
            if size
        )
        if limit:
            spans += (
                f'<i class="limit" style="left:{100 * limit / full:.2f}%" data-t="limit: {limit / MIB:,.0f} MiB"></i>'
            )
        share = f"{stage.peak_bytes / limit:.0%} of the limit" if limit else ""
        rows.append(_row(stage, spans, f"{stage.peak_bytes / MIB:,.1f} MiB", share))
    keys = " ".join(f'<span class="key"><i class="m{i}"></i>{name}</span>' for i, name in enumerate(MEMORY_PARTS))
    note = f"the line is the limit of {limit / MIB:,.0f} MiB" if limit else "no limit was given"
    return f'<p class="legend">{keys} {note}</p>\n<div class="bars">\n{"".join(rows)}</div>'


def memory_parts(stage: StagePlan) -> tuple[int, ...]:
    """Bytes of parameters, gradients, optimizer state, activations, and what is left of the peak."""
    parts = (stage.param_bytes, stage.gradient_bytes, stage.optimizer_bytes, stage.activation_bytes)
    return (*parts, max(stage.peak_bytes - sum(parts), 0))


def _span(kind: str, width: float, hover: str) -> str:
    return f'<i class="{kind}" style="width:{width:.2f}%" data-t="{html.escape(hover)}"></i>'


def _row(stage: StagePlan, spans: str, value: str, share: str) -> str:
    name = html.escape(f"{stage.index}  {modules(stage)}")
    return (
        f'<div class="bar s{stage.index}"><span class="name">{name}</span><span class="track">{spans}</span>'
        f'<span class="value">{value} <small>{share}</small></span></div>\n'
    )
