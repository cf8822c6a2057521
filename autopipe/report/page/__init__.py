"""A plan as one self-contained HTML page, which loads nothing and works from a file, in print, light and dark."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from autopipe.plan import Plan
from autopipe.report.comparison import MeasuredStage, measured_parts
from autopipe.report.explain import explain
from autopipe.report.page.bars import load_bars, memory_bars, stage_colours
from autopipe.report.page.events import compact
from autopipe.report.page.facts import facts
from autopipe.report.page.script import SCRIPT
from autopipe.report.page.style import STYLE
from autopipe.report.page.transfers import transfer_section
from autopipe.report.page.tree import tree_section
from autopipe.report.plans import plan_title, split_table, stage_table
from autopipe.report.tables import html_part
from autopipe.simulate import Timeline, simulate
from profiler.records import Profile

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}{colours}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def plan_page(
    plan: Plan,
    *,
    profile: Profile | None = None,
    measured: Sequence[MeasuredStage] = (),
    timeline: Timeline | None = None,
) -> str:
    """The page of a plan.

    Args:
        profile: with it, the module tree has times and sizes, and each tensor that crosses a cut its size.
        measured: what each stage took in a run.
        timeline: of a measured step, drawn below the simulated one on the same scale.
    """
    drawn = {"simulated": compact(simulate(plan))}
    if timeline is not None:
        drawn["measured"] = compact(timeline)
    sections = [
        facts(plan),
        f'<p class="explanation">{html.escape(explain(plan))}</p>',
        _section("Load of each stage", load_bars(plan)),
        _section("Memory of each stage", memory_bars(plan)),
        *(_section(f"Timeline, {name}", _timeline(name)) for name in drawn),
    ]
    if measured:
        sections.append(_section("Predicted and measured", "\n".join(map(html_part, measured_parts(plan, measured)))))
    sections.append(_section("Modules by stage", tree_section(plan, profile)))
    if plan.transfers:
        sections.append(_section("Tensors that cross between stages", transfer_section(plan, profile)))
    sections.append(_section("Stages in figures", html_part(stage_table(plan))))
    if plan.baselines:
        table = split_table(plan)
        sections.append(html_part(table))
    return TEMPLATE.format(
        title=html.escape(plan_title(plan)),
        style=STYLE,
        colours=stage_colours(plan.num_stages),
        body="\n".join(sections),
        data=json.dumps(drawn, separators=(",", ":")).replace("<", "\\u003c"),
        script=SCRIPT,
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{body}\n</section>"


def _timeline(name: str) -> str:
    return (
        '<p class="legend">Time runs to the right, a row for each rank. A full colour is a forward, a pale one a '
        "backward, "
        "of the stage that has this colour; the number is the micro-batch. The thin row below has what the rank "
        "sends.</p>\n"
        f'<div class="timeline" data-timeline="{name}"><noscript>The timeline is drawn by a script in this '
        "file.</noscript></div>"
    )
