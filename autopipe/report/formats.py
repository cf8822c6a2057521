"""Report of a plan in any format."""

from __future__ import annotations

import json

from autopipe.plan import Plan
from autopipe.report.page import plan_page
from autopipe.report.plans import plan_figures, plan_parts, plan_title
from autopipe.report.tables import Document, render
from profiler.records import Profile


def plan_report(plan: Plan, format: str = "table", *, profile: Profile | None = None) -> str:
    """The report of a plan as `table`, `json`, `csv` (the stages), `md` or `html` (a page with bars, timeline and
    module tree).

    JSON is the plan's own form, raw bytes and microseconds, with `report` added: it can be read as a plan.

    Args:
        profile: the profile that was planned; with it the page has the time and size of every module and tensor.

    Raises:
        ConfigError: an unknown format.
    """
    if format == "json":
        return json.dumps({**plan.to_json(), "report": plan_figures(plan)}, indent=1) + "\n"
    if format == "html":
        return plan_page(plan, profile=profile)
    return render(Document(title=plan_title(plan), parts=plan_parts(plan)), format)
