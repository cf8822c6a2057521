"""`profile`: a graph module and its inputs in, a `Profile` out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from tqdm import tqdm

from profiler.cache import DiskRecords, cache_dir
from profiler.calibrate import calibrated, measured_segments
from profiler.errors import ProfileError
from profiler.graph import compute_inputs, compute_nodes, module_of
from profiler.inputs import device_name, dtype_name, find_device, input_values, microbatch_size, place
from profiler.nodes import NodeTimer
from profiler.records import NodeProfile, Profile, SegmentProfile
from profiler.state import preserved
from profiler.tensors import ModelTensors
from profiler.values import Value
from profiler.walk import Visit, Walk

CALIBRATION_S = 2.0
"""Segments are measured for at least this long, also where the nodes are known."""


def profile(
    graph_module: fx.GraphModule,
    args: Sequence[Any] = (),
    *,
    device: torch.device | str | None = None,
    train: bool = True,
    relative_error: float = 0.05,
    budget_s: float = 60.0,
    progress: bool = True,
    cache: bool = True,
    calibrate: bool = True,
    names: Mapping[str, str] | None = None,
    graph_hash: str = "",
    num_together: int = 1,
) -> Profile:
    """Measures every compute node of a graph on the device that will run it.

    Nodes of the same signature (operator, attributes, shapes, dtypes, strides, gradient flags, modes) are measured
    once. Parameters, buffers, gradients, random states and modes are afterwards as they were.

    Args:
        graph_module: any `torch.fx.GraphModule`, its modules in the mode (train or eval) that is to be measured.
        args: the values of its placeholders in order, at micro-batch size. Left out, or on `meta`: made up from the
            shapes in `node.meta["val"]`.
        device: where to measure; the device of the first parameter or argument where it is None.
        train: measure backward, and what is kept for it. False: forward only, under `no_grad`.
        relative_error: repeat a node until the 95 % confidence interval of its time is this narrow, relative to its
            median.
        budget_s: stop repeating, though not measuring, after this many seconds; the spread reached is in the profile.
        progress: a progress bar on stderr, where that is a terminal.
        cache: read and write measurements of earlier runs on this device (see `profiler.cache`).
        calibrate: time a few contiguous segments too, as a stage runs them, and multiply the times of their nodes by
            what these, by themselves, miss; takes two seconds, or half of the time that the nodes took.
        names: for parameters and buffers with several names, the one to report (optional; otherwise the first).
        graph_hash: copied into the profile.
        num_together: processes of this host that call this at the same time, as the ranks of a run do; a cached
            measurement holds for that number alone.

    Returns:
        The profile; times in microseconds, sizes in bytes, for one micro-batch.

    Raises:
        ProfileError: a device that is not there, missing or surplus args, a graph with nothing to measure, or a node
            that fails (named, with its module and shapes).
    """
    where = find_device(graph_module, args, device)
    if not relative_error > 0 or not budget_s >= 0:
        raise ProfileError(
            f"relative_error={relative_error}, budget_s={budget_s}",
            expected="relative_error > 0 and budget_s >= 0",
            remedy="leave both out for their defaults",
        )
    nodes = compute_nodes(graph_module.graph)
    if not nodes:
        raise ProfileError(
            "a graph without compute nodes", expected="at least one", remedy="profile a graph that computes"
        )
    inputs = input_values(graph_module, args)
    bar = tqdm(total=len(nodes), desc="profile", unit="node", disable=None if progress else True, leave=False)
    with preserved(graph_module, where), torch.set_grad_enabled(train), bar:
        tensors = ModelTensors(graph_module, where, names)
        timer = NodeTimer(where, relative_error)
        records = DiskRecords(where, relative_error, cache_dir() if cache else None, num_together)
        start = time.perf_counter()
        measured, made_up = _measure(graph_module, inputs, where, timer, budget_s, tensors, records, bar)
        segments: list[SegmentProfile] = []
        if calibrate:
            # Half of what the nodes took: independent of the depth of the graph, as their time is.
            spare_s = max(CALIBRATION_S, min(budget_s, time.perf_counter() - start) / 2)
            segments = measured_segments(
                graph_module, inputs, where, tensors, timer, records, measured, spare_s, made_up
            )
            measured = calibrated(graph_module.graph, measured, segments)
    return Profile(
        nodes=tuple(measured),
        device=device_name(where),
        dtype=dtype_name(graph_module),
        torch=torch.__version__,
        microbatch_size=microbatch_size(inputs),
        parameters=tensors.profiles(),
        segments=tuple(segments),
        graph_hash=graph_hash,
    )


def _measure(
    model: fx.GraphModule,
    inputs: Sequence[Any],
    device: torch.device,
    timer: NodeTimer,
    budget_s: float,
    tensors: ModelTensors,
    records: DiskRecords,
    bar: tqdm[Any],
) -> tuple[list[NodeProfile], bool]:
    """Walks the graph; where made-up values were the reason for a failure, once more on true ones. Says which it
    was."""
    for make_up_values in (True, False):
        found: list[NodeProfile] = []

        def visited(visit: Visit, found: list[NodeProfile] = found) -> None:
            found.append(node_profile(visit, tensors))
            bar.update(len(found) - bar.n if len(found) > bar.n else 0)

        tensors.reset()
        values = [place(v, device) for v in inputs]
        walk = Walk(model, values, device, tensors, timer.measure, records, budget_s, make_up_values)
        try:
            walk.run(visited)
        except ProfileError:
            if not walk.made_up:
                raise
            continue
        return [dataclasses.replace(n, saved_bytes=walk.saved_bytes[n.name]) for n in found], make_up_values
    raise AssertionError("the second walk makes up nothing")


def node_profile(visit: Visit, tensors: ModelTensors) -> NodeProfile:
    """The profile of a node that was visited; its saved bytes are known only after the whole walk."""
    node, timing, trace = visit.call.node, visit.record.timing, visit.trace
    attributes = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    targets = [*attributes, *(v.target for v in visit.call.own.values() if v.target is not None)]
    params = tuple(dict.fromkeys(name for t in targets if (name := tensors.name_of(t)) is not None))
    group = node.meta.get("group")
    again = visit.is_recomputed and timing.backward_us > 0
    keeps, views = _memory_of(visit)
    return NodeProfile(
        name=node.name,
        inputs=compute_inputs(node),
        forward_us=timing.forward_us,
        backward_us=timing.backward_us + (timing.forward_us if again else 0.0),
        output_bytes=sum(o.num_bytes for o in trace.outputs),
        module=module_of(node),
        params=params,
        param_bytes=sum(tensors.bytes_of(p) for p in params),
        workspace_bytes=timing.workspace_bytes,
        differentiable=any(o.requires_grad for o in trace.outputs),
        group=None if group is None else str(group),
        spread=timing.spread,
        keeps=keeps,
        views=views,
        inner_bytes=0 if visit.is_recomputed else trace.saved_inside_bytes,
        repeatable=_is_repeatable(visit),
    )


def _memory_of(visit: Visit) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The nodes whose outputs the node keeps for backward, and the nodes and parameters into whose memory its own
    output looks."""
    own, sources = visit.call.node.name, visit.call.sources
    if visit.is_recomputed:  # the region keeps what it is given
        keeps = [storage.owner for storage in sources]
    else:
        keeps = [own if place < 0 else sources[place].owner for place in visit.trace.saved]
    leaves = (v.storage.owner or v.storage.param for v in pytree.tree_leaves(visit.output) if isinstance(v, Value))
    return _names(keeps), tuple(name for name in _names(leaves) if name != own)


def _names(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name is not None))


def _is_repeatable(visit: Visit) -> bool:
    """Whether running the node again has no effect but its value; its module's buffers can be set aside meanwhile.

    Not so: what the model itself computes again, modules that are not torch's own or have hooks, and writes to model
    inputs.
    """
    call, written = visit.call, [visit.call.values[i] for i in visit.trace.written]
    plain = call.module is None or type(call.module).__module__.startswith("torch.nn.")
    hooked = call.module is not None and bool(call.module._forward_hooks or call.module._forward_pre_hooks)
    writes_input = any(v.storage.owner is None and v.target is None for v in written)
    return plain and not hooked and not writes_input and "checkpoint" not in call.node.meta
