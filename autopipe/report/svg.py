"""A timeline as an SVG picture: a row for the compute of each rank, thin rows for its links, time to the right."""

from __future__ import annotations

import html
import math

from autopipe.report.perfetto import NAMES, row_name
from autopipe.simulate import Event, Timeline

WIDTH, LEFT, RIGHT, TOP, AXIS = 1200, 70, 110, 30, 24
COMPUTE_HEIGHT, LINK_HEIGHT, GAP = 26, 7, 10
MIN_LABEL_WIDTH = 14

STYLE = """
svg { font: 11px system-ui, sans-serif; }
text { fill: #222; } .axis { stroke: #999; stroke-width: .5; } .idle { fill: #888; fill-opacity: .15; }
.F { fill: #4c8bf5; } .B, .I { fill: #2f9e62; } .W { fill: #b48a12; } .SEND_F { fill: #8fb7ff; } .SEND_B { fill: #85cfa6; }
.REDUCE_GRAD { fill: #c2255c; } .label { fill: #fff; text-anchor: middle; pointer-events: none; }
.legend, .unit { text-anchor: start; } .tick { text-anchor: middle; } .rank { text-anchor: end; }
@media (prefers-color-scheme: dark) { text { fill: #ddd; } .label { fill: #fff; } }
"""


def timeline_svg(timeline: Timeline) -> str:
    """The picture as one SVG element: colours by kind, the micro-batch in each compute, details under the pointer,
    light and dark."""
    rows = _rows(timeline)
    height = max(y + h for y, h in rows.values()) + AXIS + 24
    scale = (WIDTH - LEFT - RIGHT) / timeline.makespan_us if timeline.makespan_us else 0.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="timeline of {timeline.num_ranks} ranks">',
        f"<style>{STYLE}</style>",
        *_legend(),
        *_ranks(timeline, rows),
        *(_box(event, rows[event.rank, row_name(event)], scale) for event in timeline.events if event.kind in NAMES),
        *_axis(timeline, height - AXIS, scale),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _rows(timeline: Timeline) -> dict[tuple[int, str], tuple[float, float]]:
    """Top and height of each row: a rank's compute, then its links."""
    names = {(rank, "compute") for rank in range(timeline.num_ranks)}
    names |= {(event.rank, row_name(event)) for event in timeline.events if event.kind in NAMES}
    rows, y = {}, float(TOP)
    for rank in range(timeline.num_ranks):
        own = sorted(name for r, name in names if r == rank)
        for name in own:
            height = COMPUTE_HEIGHT if name == "compute" else LINK_HEIGHT
            rows[rank, name] = (y, float(height))
            y += height + 1
        y += GAP
    return rows


def _legend() -> list[str]:
    parts, x = [], LEFT
    for kind in ("F", "B", "SEND_F", "SEND_B"):
        parts.append(f'<rect class="{kind}" x="{x}" y="8" width="10" height="10" rx="2"/>')
        parts.append(f'<text class="legend" x="{x + 14}" y="17">{NAMES[kind]}</text>')
        x += 90
    return parts


def _ranks(timeline: Timeline, rows: dict[tuple[int, str], tuple[float, float]]) -> list[str]:
    parts = []
    for rank in range(timeline.num_ranks):
        y, height = rows[rank, "compute"]
        parts.append(f'<rect class="idle" x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{height}"/>')
        parts.append(f'<text class="rank" x="{LEFT - 8}" y="{y + 17}">rank {rank}</text>')
        parts.append(
            f'<text class="unit" x="{WIDTH - RIGHT + 8}" y="{y + 17}">waits {timeline.bubble[rank]:.0%}</text>'
        )
    return parts


def _box(event: Event, row: tuple[float, float], scale: float) -> str:
    y, height = row
    x, width = LEFT + event.start_us * scale, max((event.end_us - event.start_us) * scale, 0.5)
    peer = f" to stage {event.peer}" if event.peer >= 0 else ""
    hover = (
        f"{NAMES[event.kind]}, stage {event.stage}{peer}, micro-batch {event.microbatch}: "
        f"{event.start_us / 1e3:.3f} to {event.end_us / 1e3:.3f} ms"
    )
    rect = (
        f'<rect class="{event.kind}" x="{x:.2f}" y="{y}" width="{max(width - 0.4, 0.3):.2f}" height="{height}">'
        f"<title>{html.escape(hover)}</title></rect>"
    )
    if event.peer >= 0 or width < MIN_LABEL_WIDTH:
        return rect
    return rect + f'<text class="label" x="{x + width / 2:.2f}" y="{y + 17}">{event.microbatch}</text>'


def _axis(timeline: Timeline, y: float, scale: float) -> list[str]:
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>']
    step = _tick_us(timeline.makespan_us)
    for i in range(int(timeline.makespan_us / step) + 1 if step else 1):
        x = LEFT + i * step * scale
        parts.append(f'<line class="axis" x1="{x:.2f}" x2="{x:.2f}" y1="{y}" y2="{y + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.2f}" y="{y + 16}">{i * step / 1e3:g}</text>')
    parts.append(f'<text class="unit" x="{WIDTH - RIGHT + 8}" y="{y + 16}">ms</text>')
    return parts


def _tick_us(makespan_us: float) -> float:
    """A round distance of ticks: 1, 2 or 5 times a power of ten, at most ten of them."""
    if makespan_us <= 0:
        return 0.0
    unit = 10.0 ** math.floor(math.log10(makespan_us / 10))
    return next(unit * m for m in (1, 2, 5, 10, 20) if makespan_us / (unit * m) <= 10)
