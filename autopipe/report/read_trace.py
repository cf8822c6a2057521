"""Read a timeline from a trace that `engine.trace(path)` or `autopipe simulate -o trace.json` wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from autopipe.errors import ConfigError
from autopipe.report.perfetto import NAMES
from autopipe.simulate import Event, Timeline
from profiler.records import read_json

NAME = re.compile(rf"(\d+)({'|'.join(sorted(NAMES, key=len, reverse=True))})(\d+)")


def read_trace(path: str | Path) -> Timeline:
    """The timeline of a trace.

    Raises:
        ConfigError: the file is no trace of autopipe.
    """
    remedy = "write one with engine.trace(path), or with `autopipe simulate -o trace.json`"
    data = read_json(path, ConfigError, remedy)
    rows = data.get("traceEvents") if isinstance(data, dict) else None
    events = [e for row in rows if (e := _event(row)) is not None] if isinstance(rows, list) else []
    if not events:
        raise ConfigError("no events", expected="a trace that autopipe wrote", where=str(path), remedy=remedy)
    makespan = max(e.end_us for e in events)
    ranks = max(e.rank for e in events) + 1
    busy = [0.0] * ranks
    for e in events:
        if e.peer < 0 and e.kind != "REDUCE_GRAD":
            busy[e.rank] += e.end_us - e.start_us
    bubble = tuple(1 - b / makespan if makespan else 0.0 for b in busy)
    return Timeline(events=tuple(events), makespan_us=makespan, bubble=bubble, peak_bytes=(0,) * ranks)


def _event(row: Any) -> Event | None:
    if not isinstance(row, dict) or row.get("ph") != "X":
        return None
    match = NAME.fullmatch(str(row.get("name")))
    if match is None:
        return None
    peer = int((row.get("args") or {}).get("peer", -1))
    kind: Any = match[2]
    start = float(row["ts"])
    return Event(int(row["pid"]), kind, int(match[1]), int(match[3]), peer, start, start + float(row["dur"]))
