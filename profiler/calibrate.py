"""From the times of nodes by themselves to their times within the graph: a few segments are measured, and show the
difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from profiler.errors import ProfileError
from profiler.graph import is_compute, recomputed_nodes
from profiler.inputs import place
from profiler.nodes import NodeTimer
from profiler.records import NodeProfile, SegmentProfile
from profiler.segments import Segment, SegmentTimer, choose_segments
from profiler.tensors import ModelTensors
from profiler.walk import Records, Walk


def measured_segments(
    model: fx.GraphModule,
    inputs: Sequence[Any],
    device: torch.device,
    tensors: ModelTensors,
    timer: NodeTimer,
    records: Records,
    profiles: Sequence[NodeProfile],
    budget_s: float,
    make_up_values: bool,
) -> list[SegmentProfile]:
    """Goes through the graph again, on what is known of its nodes, and times segments where they begin.

    Args:
        model, inputs, device, tensors, timer, records: as for the walk that made the profiles.
        profiles: the nodes, as measured.
        budget_s: time for all segments together; it limits their length.
        make_up_values: whether random numbers may stand for the values of nodes that are known; where that makes
            something fail, the graph is gone through once more on true values.

    Raises:
        ProfileError: a segment fails.
    """
    segments = choose_segments(model.graph, profiles, budget_s)
    again = {n.name for n in recomputed_nodes(model.graph)}
    costs = {p.name: _once(p) if p.name in again else p for p in profiles}
    segment_timer = SegmentTimer(model, tensors, timer.clock, timer.backward_start_us)

    def measured(made_up: bool) -> list[SegmentProfile]:
        tensors.reset()
        values = [place(v, device) for v in inputs]
        walk = Walk(model, values, device, tensors, timer.measure, records, budget_s, made_up)
        return _measured(walk, segments, segment_timer, costs)

    try:
        return measured(make_up_values)
    except ProfileError:
        if not make_up_values:
            raise
        return measured(False)


def _measured(
    walk: Walk, segments: Sequence[Segment], segment_timer: SegmentTimer, costs: dict[str, NodeProfile]
) -> list[SegmentProfile]:
    """Times each segment as the walk comes to its first node."""
    due = {s.nodes[0]: s for s in segments}
    found: list[SegmentProfile] = []

    def arriving(node: fx.Node) -> bool:
        segment = due.pop(node, None)
        if segment is None:
            return bool(due)
        try:
            values = [walk.real_output(n) for n in segment.inputs if n.op != "get_attr"]
            found.append(_profile(segment, segment_timer.measure_us(segment, values), costs))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as cause:
            raise ProfileError(
                f"the segment from node {node.name!r} failed: {type(cause).__name__}: {cause}",
                where="calibration",
                remedy="profile with calibrate=False",
            ) from cause
        return bool(due)

    walk.run(lambda visit: None, arriving)
    return found


def _profile(segment: Segment, measured_us: tuple[float, float], costs: dict[str, NodeProfile]) -> SegmentProfile:
    nodes = [costs[n.name] for n in segment.nodes if is_compute(n)]
    return SegmentProfile(
        first=nodes[0].name,
        last=nodes[-1].name,
        forward_us=measured_us[0],
        backward_us=measured_us[1],
        nodes_forward_us=sum(n.forward_us for n in nodes),
        nodes_backward_us=sum(n.backward_us for n in nodes),
    )


def _once(profile: NodeProfile) -> NodeProfile:
    """A node of a checkpoint region without the forward that its backward begins with: segments run it once."""
    return dataclasses.replace(profile, backward_us=max(0.0, profile.backward_us - profile.forward_us))


def calibrated(
    graph: fx.Graph, profiles: Sequence[NodeProfile], segments: Sequence[SegmentProfile]
) -> list[NodeProfile]:
    """The nodes with their times multiplied by the ratio of their segment; outside of any, by that of all segments
    together."""
    ratios = {s.first: _ratios([s]) for s in segments}
    last = {s.last for s in segments}
    overall = current = _ratios(segments)
    again = {n.name for n in recomputed_nodes(graph)}
    found = []
    for node in profiles:
        current = ratios.get(node.name, current)
        forward, backward = current
        own = _once(node).backward_us if node.name in again else node.backward_us
        found.append(
            dataclasses.replace(
                node,
                forward_us=node.forward_us * forward,
                backward_us=own * backward + (node.backward_us - own) * forward,
            )
        )
        if node.name in last:
            current = overall
    return found


def _ratios(segments: Sequence[SegmentProfile]) -> tuple[float, float]:
    """Measured time over that of the nodes by themselves, forward and backward; 1 where they take none."""
    sums = [
        (sum(s.forward_us for s in segments), sum(s.nodes_forward_us for s in segments)),
        (sum(s.backward_us for s in segments), sum(s.nodes_backward_us for s in segments)),
    ]
    forward, backward = (a / b if a > 0 and b > 0 else 1.0 for a, b in sums)
    return forward, backward
