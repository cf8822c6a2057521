"""The `residual` of a profile: measured time of a few segments over the time of their nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from profiler.errors import ProfileError
from profiler.inputs import place
from profiler.nodes import NodeTimer
from profiler.records import NodeProfile
from profiler.segments import SegmentTimer, choose_segments
from profiler.tensors import ModelTensors
from profiler.walk import Records, Walk


def residual_of(
    model: fx.GraphModule,
    inputs: Sequence[Any],
    device: torch.device,
    tensors: ModelTensors,
    timer: NodeTimer,
    records: Records,
    profiles: Sequence[NodeProfile],
    budget_s: float,
    make_up_values: bool,
) -> float:
    """Goes through the graph again, on what is known of its nodes, and times segments where they begin.

    Args:
        model, inputs, device, tensors, timer, records: as for the walk that made the profiles.
        profiles: the nodes, as measured.
        budget_s: time for all segments together; it limits their length.
        make_up_values: whether random numbers may stand for the values of nodes that are known.

    Returns:
        The ratio; 1.0 where the nodes take no time.

    Raises:
        ProfileError: a segment fails.
    """
    segments = {s.nodes[0]: s for s in choose_segments(model.graph, profiles, budget_s)}
    tensors.reset()
    walk = Walk(
        model, [place(v, device) for v in inputs], device, tensors, timer.measure, records, budget_s, make_up_values
    )
    segment_timer = SegmentTimer(model, tensors, timer.clock, timer.backward_start_us)
    measured_us = nodes_us = 0.0

    def arriving(node: fx.Node) -> bool:
        nonlocal measured_us, nodes_us
        segment = segments.pop(node, None)
        if segment is None:
            return bool(segments)
        try:
            values = [walk.real_output(n) for n in segment.inputs if n.op != "get_attr"]
            measured_us += segment_timer.measure_us(segment, values)
            nodes_us += segment.nodes_us
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as cause:
            raise ProfileError(
                f"the segment from node {node.name!r} failed: {type(cause).__name__}: {cause}",
                where="calibration",
                remedy="profile with calibrate=False",
            ) from cause
        return bool(segments)

    walk.run(lambda visit: None, arriving)
    return measured_us / nodes_us if nodes_us > 0 else 1.0
