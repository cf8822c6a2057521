"""A timeline as a trace that Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (complete events, times in
microseconds).
"""

from __future__ import annotations

from typing import Any

from autopipe.simulate import Event, Timeline

NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward of inputs",
    "W": "backward of weights",
    "SEND_F": "activation",
    "SEND_B": "gradient",
    "REDUCE_GRAD": "reduce tied gradients",
}


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The trace as plain values, ready for `json.dumps`: a process for each rank, a thread for its compute and one for
    each link."""
    threads: dict[tuple[int, str], int] = {(rank, "compute"): 0 for rank in range(timeline.num_ranks)}
    rows = []
    for event in timeline.events:
        if event.kind not in NAMES:
            continue
        row = (event.rank, row_name(event))
        thread = threads.setdefault(row, sum(rank == event.rank for rank, _ in threads))
        rows.append(
            {
                "ph": "X",
                "name": f"{event.stage}{event.kind}{event.microbatch}",
                "cat": NAMES[event.kind],
                "pid": event.rank,
                "tid": thread,
                "ts": event.start_us,
                "dur": event.end_us - event.start_us,
                "args": {"stage": event.stage, "microbatch": event.microbatch, "peer": event.peer},
            }
        )
    return {"traceEvents": [*_labels(threads), *rows], "displayTimeUnit": "ms"}


def row_name(event: Event) -> str:
    """The row in which an event is drawn: compute, or the link that it holds."""
    return f"stage {event.stage} → {event.peer}" if event.peer >= 0 else "compute"


def _labels(threads: dict[tuple[int, str], int]) -> list[dict[str, Any]]:
    labels: list[dict[str, Any]] = []
    for rank in sorted({rank for rank, _ in threads}):
        labels.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        labels.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
    for (rank, row), thread in threads.items():
        labels.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": row}})
        labels.append(
            {"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": thread, "args": {"sort_index": thread}}
        )
    return labels
