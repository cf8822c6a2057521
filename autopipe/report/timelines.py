"""Report of a timeline: a row for each rank, and in HTML the picture above it."""

from __future__ import annotations

import dataclasses
import json

from autopipe.report.perfetto import chrome_trace
from autopipe.report.svg import timeline_svg
from autopipe.report.tables import Cell, Column, Document, Table, html_part, page, render
from autopipe.simulate import Timeline
from autopipe.units import MIB

COLUMNS = (
    Column(name="rank"),
    Column(name="computes"),
    Column(name="busy ms", decimals=2),
    Column(name="bubble %", decimals=1),
    Column(name="peak MiB", decimals=1),
)
TIMELINE_FORMATS = ("table", "json", "csv", "md", "html", "trace", "svg")


def timeline_report(timeline: Timeline, format: str = "table", *, title: str = "Timeline") -> str:
    """A timeline as `table`, `json`, `csv` (the ranks), `md`, `html` (with the picture), `trace` (Perfetto, Chrome) or
    `svg`.

    Raises:
        ConfigError: an unknown format.
    """
    match format:
        case "json":
            return json.dumps(dataclasses.asdict(timeline), indent=1) + "\n"
        case "trace":
            return json.dumps(chrome_trace(timeline)) + "\n"
        case "svg":
            return timeline_svg(timeline)
    summary = f"step time {timeline.makespan_us / 1e3:,.2f} ms, bubble {timeline.mean_bubble:.1%}"
    ranks = _ranks(timeline)
    if format == "html":
        picture = f'<div class="figure">{timeline_svg(timeline)}</div>'
        return page(title, f"{picture}\n{html_part(summary)}\n{html_part(ranks)}")
    return render(Document(title=title, parts=(ranks, summary)), format)


def _ranks(timeline: Timeline) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for rank in range(timeline.num_ranks):
        computes = sum(
            event.rank == rank and event.peer < 0 and event.kind != "REDUCE_GRAD" for event in timeline.events
        )
        bubble, peak = timeline.bubble[rank], timeline.peak_bytes[rank]
        busy_ms = (1 - bubble) * timeline.makespan_us / 1e3
        rows.append((rank, computes, busy_ms, 100 * bubble, peak / MIB))
    return Table(title="", columns=COLUMNS, rows=tuple(rows))
