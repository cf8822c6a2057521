"""The most important figures of a plan, as tiles."""

from __future__ import annotations

import html

from autopipe.plan import Plan
from autopipe.report.plans import gap_of, link_words, samples_per_s
from autopipe.units import MIB


def facts(plan: Plan) -> str:
    """Tiles: a figure and what it is."""
    rate, gap = samples_per_s(plan), gap_of(plan)
    worst = max(plan.stages, key=lambda stage: stage.peak_bytes)
    tiles = [
        (f"{plan.step_us / 1e3:,.2f} ms", "time of a step, without the optimizer"),
        (f"{rate:,.1f}" if rate is not None else "-", "samples a second"),
        (f"{plan.bubble:.1%}", "bubble: time in which devices do not compute"),
        (f"{plan.imbalance:.1%}", "imbalance: slowest stage over the mean"),
        (f"{worst.peak_bytes / MIB:,.1f} MiB", f"most memory, on stage {worst.index}"),
    ]
    if gap is not None:
        tiles.append((f"{gap:.1%}", f"above the lower bound of {plan.lower_bound_us / 1e3:,.2f} ms"))
    items = "\n".join(f"<div><dt>{html.escape(what)}</dt><dd>{html.escape(value)}</dd></div>" for value, what in tiles)
    link = f'<p class="note">{html.escape(link_words(plan))}</p>' if plan.num_stages > 1 else ""
    return f'<dl class="facts">\n{items}\n</dl>\n{link}'
