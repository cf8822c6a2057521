"""Report of a run, predicted and measured, in any format; read back from JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autopipe.errors import ConfigError
from autopipe.plan import Plan
from autopipe.report.comparison import MeasuredStage, measured_parts, measured_title
from autopipe.report.notebook import ReportText
from autopipe.report.page import plan_page
from autopipe.report.tables import Document, render
from autopipe.simulate import Timeline
from profiler.records import read_json

__all__ = ["MeasuredStage", "load_measured", "measured_report"]

REMEDY = "write one with engine.report('json')"


def measured_report(
    plan: Plan, measured: Sequence[MeasuredStage], format: str = "table", *, timeline: Timeline | None = None
) -> str:
    """Report predicted and measured figures as `table`, `json`, `csv`, `md` or `html`.

    HTML is the plan's page, with a measured timeline if given.

    A notebook shows a `table` as HTML.

    Raises:
        ConfigError: an unknown format.
    """
    if format == "json":
        return (
            json.dumps({"plan": plan.to_json(), "measured": [dataclasses.asdict(s) for s in measured]}, indent=1) + "\n"
        )
    if format == "html":
        return plan_page(plan, measured=measured, timeline=timeline)
    document = Document(title="No step measured yet", parts=("Two training steps are needed: the first warms up.",))
    if measured:
        document = Document(title=measured_title(plan, measured), parts=measured_parts(plan, measured))
    return ReportText(document) if format == "table" else render(document, format)


def load_measured(path: str | Path) -> tuple[Plan, list[MeasuredStage]]:
    """The plan and the measured stages of a file that `engine.report("json")` gave.

    Raises:
        ConfigError: it is no such file.
        PlanError: the plan in it is not valid.
    """
    data = read_json(path, ConfigError, REMEDY)
    if not isinstance(data, dict) or not isinstance(data.get("measured"), list) or "plan" not in data:
        raise ConfigError(
            "no 'plan' and 'measured'", expected="the report of a run as JSON", where=str(path), remedy=REMEDY
        )
    plan = Plan.from_json(data["plan"])
    return plan, [_stage(plan, row, f"{path}: measured[{i}]") for i, row in enumerate(data["measured"])]


def _stage(plan: Plan, row: Any, where: str) -> MeasuredStage:
    row = row if isinstance(row, dict) else {}
    names = [f.name for f in dataclasses.fields(MeasuredStage) if f.default is dataclasses.MISSING or f.name in row]
    numbers = all(isinstance(row.get(name), (int, float)) for name in names)
    if not numbers or not 0 <= row["index"] < plan.num_stages:
        raise ConfigError(
            "a stage that cannot be read", expected=f"numbers for {', '.join(names)}", where=where, remedy=REMEDY
        )
    return MeasuredStage(**{name: row[name] for name in names})
