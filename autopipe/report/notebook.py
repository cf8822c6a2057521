"""How a Plan and a Timeline show themselves in a notebook: `_repr_html_`, given to both classes here, where reports are made.

The classes stand before this package in the order of imports, so they cannot make their reports themselves.
"""

from __future__ import annotations

from autopipe.plan import Plan
from autopipe.report.plans import plan_parts, plan_title
from autopipe.report.svg import timeline_svg
from autopipe.report.tables import html_part
from autopipe.simulate import Timeline


def plan_html(plan: Plan) -> str:
    """A plan as an HTML fragment: its tables and the explanation."""
    return "\n".join([html_part(plan_title(plan)), *map(html_part, plan_parts(plan))])


def timeline_html(timeline: Timeline) -> str:
    """A timeline as an HTML fragment: its picture."""
    return timeline_svg(timeline)


def show_in_notebooks() -> None:
    """Gives both classes their `_repr_html_`."""
    for shown, method in ((Plan, plan_html), (Timeline, timeline_html)):
        setattr(shown, "_repr_html_", method)  # noqa: B010
