"""Timelines as a trace, a picture and tables."""

import csv
import io
import json
import xml.etree.ElementTree as ET

import pytest

from autopipe.report import chrome_trace, timeline_report, timeline_svg
from autopipe.schedule import Costs, Edge, build_schedule
from autopipe.simulate import Timeline, simulate_schedule


@pytest.fixture
def timeline() -> Timeline:
    edges = [Edge(0, 1), Edge(1, 2), Edge(0, 2)]
    costs = Costs(
        forward_us=(1000.0,) * 3, backward_us=(2000.0,) * 3, links={(e.source, e.target): (100.0, 50.0) for e in edges}
    )
    return simulate_schedule(build_schedule("1f1b", 3, 5, edges, costs=costs, reductions=[(0, 2)]), costs)


def test_trace_has_every_event_on_its_lane(timeline: Timeline) -> None:
    trace = json.loads(json.dumps(chrome_trace(timeline)))
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(events) == len(timeline.events)
    assert all(isinstance(e["pid"], int) and isinstance(e["tid"], int) and e["dur"] >= 0 for e in events)
    assert max(e["ts"] + e["dur"] for e in events) == timeline.makespan_us
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert {names[e["pid"], e["tid"]] for e in events if e["cat"] == "forward"} == {"compute"}
    assert names.keys() >= {(e["pid"], e["tid"]) for e in events}
    lanes: dict[tuple[int, int], float] = {}
    for e in sorted(events, key=lambda e: (e["ts"], e["ts"] + e["dur"])):
        assert e["ts"] >= lanes.get((e["pid"], e["tid"]), 0.0) - 1e-9, "events of a lane do not overlap"
        lanes[e["pid"], e["tid"]] = e["ts"] + e["dur"]


def test_svg_draws_every_event_inside_the_picture(timeline: Timeline) -> None:
    root = ET.fromstring(timeline_svg(timeline))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    rects = [e for e in root.iter() if e.tag.endswith("rect")]
    titles = [e.text for e in root.iter() if e.tag.endswith("title")]
    assert len(titles) == len(timeline.events)
    assert "forward, stage 0, micro-batch 0: 0.000 to 1.000 ms" in titles
    for rect in rects:
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width
        assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= height


def test_report_formats(timeline: Timeline) -> None:
    rows = list(csv.DictReader(io.StringIO(timeline_report(timeline, "csv"))))
    assert [float(row["busy ms"]) for row in rows] == pytest.approx([15.0, 15.0, 15.0])
    data = json.loads(timeline_report(timeline, "json"))
    assert data["makespan_us"] == timeline.makespan_us
    assert len(data["events"]) == len(timeline.events)
    page = timeline_report(timeline, "html", title="a <plan>")
    assert "<svg" in page and "a &lt;plan&gt;" in page
    assert "step time" in timeline_report(timeline, "md")


def test_empty_times_are_drawn() -> None:
    costs = Costs(forward_us=(0.0,), backward_us=(0.0,))
    still = simulate_schedule(build_schedule("1f1b", 1, 2, [], costs=costs), costs)
    assert still.bubble == (0.0,)
    ET.fromstring(timeline_svg(still))
