"""A timeline as the numbers that the page's script draws, a few bytes for each event."""

from __future__ import annotations

from typing import Any

from autopipe.report.perfetto import NAMES
from autopipe.simulate import Timeline

KINDS = tuple(NAMES)
RESOLUTION = 200_000
MAX_EVENTS = 12_000


def compact(timeline: Timeline) -> dict[str, Any]:
    """Plain values: `e` is a flat list, seven whole numbers an event: rank, kind, stage, peer + 1, micro-batch, start,
    length.

    Times are in `unit_us`. If there are too many events, transfers are left out, then everything after the first of
    them.
    """
    events = [e for e in timeline.events if e.kind in NAMES]
    note = ""
    if len(events) > MAX_EVENTS:
        events, note = [e for e in events if e.peer < 0], "transfers are not drawn"
    if len(events) > MAX_EVENTS:
        events, note = (
            sorted(events, key=lambda e: e.start_us)[:MAX_EVENTS],
            f"the first {MAX_EVENTS:,} computes are drawn",
        )
    unit = timeline.makespan_us / RESOLUTION or 1.0
    flat: list[int] = []
    for e in events:
        start = round(e.start_us / unit)
        flat += [e.rank, KINDS.index(e.kind), e.stage, e.peer + 1, e.microbatch, start, round(e.end_us / unit) - start]
    return {
        "unit_us": unit,
        "makespan_us": timeline.makespan_us,
        "bubble": [round(b, 4) for b in timeline.bubble],
        "kinds": [NAMES[k] for k in KINDS],
        "codes": list(KINDS),
        "note": note,
        "e": flat,
    }
