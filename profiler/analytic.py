"""`estimate`: the profile of a graph on a device that is not here, from FLOPs and bytes over its published rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from profiler.api import node_profile
from profiler.cache import DiskRecords
from profiler.call import Call
from profiler.devices import find_spec
from profiler.errors import ProfileError
from profiler.graph import compute_nodes
from profiler.inputs import dtype_name, input_values, microbatch_size
from profiler.nodes import Timing
from profiler.records import DeviceSpec, NodeProfile, Profile
from profiler.roofline import RooflineClock
from profiler.state import preserved
from profiler.tensors import ModelTensors
from profiler.trace import Trace
from profiler.trial import Trial
from profiler.walk import Visit, Walk

_CPU = torch.device("cpu")


def estimate(
    graph_module: fx.GraphModule,
    args: Sequence[Any] = (),
    *,
    device: str | DeviceSpec = "h100",
    train: bool = True,
    names: Mapping[str, str] | None = None,
    graph_hash: str = "",
) -> Profile:
    """Estimates every compute node of a graph, without a device and without values: a 7B model takes seconds.

    The graph runs on fake tensors. For each ATen operator of forward and backward the time is the larger of
    FLOPs / (peak × share) and bytes / (bandwidth × share), and at least the time of starting a kernel; the shares are
    in `profiler.devices`, with their sources. Bytes kept for backward are those that autograd keeps on a CPU, which has
    the fused attention; a dropout mask, one byte an element on a GPU, counts as much as its input.

    Args:
        graph_module: as for `profiler.profile`; its parameters may be on `meta`.
        args: the values of the placeholders; only shapes, dtypes and Python numbers are read. Left out: as noted by
            capture.
        device: a name (`h100`, `h200`, `a100`, `l40s`, `mi300x`, `cpu`) or the published figures.
        train: estimate backward, and what is kept for it.
        names: as for `profiler.profile`.
        graph_hash: copied into the profile.

    Returns:
        The profile, every row with `measured=False`; times in microseconds, sizes in bytes.

    Raises:
        ProfileError: an unknown device, missing args, or a node that cannot run without values (named).
    """
    spec = find_spec(device)
    inputs = input_values(graph_module, args)
    if not compute_nodes(graph_module.graph):
        raise ProfileError(
            "a graph without compute nodes", expected="at least one", remedy="give a graph that computes"
        )
    found: list[NodeProfile] = []
    with preserved(graph_module, _CPU), FakeTensorMode(), torch.set_grad_enabled(train):
        tensors = ModelTensors(graph_module, _CPU, names, is_fake=True)

        def visited(visit: Visit) -> None:
            found.append(dataclasses.replace(node_profile(visit, tensors), measured=False))

        values = [_fake(v) for v in inputs]
        walk = Walk(
            graph_module, values, _CPU, tensors, Estimator(spec).measure, DiskRecords(_CPU, 1.0, None), 0.0, False
        )
        walk.run(visited)
    return Profile(
        nodes=tuple(dataclasses.replace(n, saved_bytes=walk.saved_bytes[n.name]) for n in found),
        device=spec.name,
        dtype=dtype_name(graph_module),
        torch=torch.__version__,
        microbatch_size=microbatch_size(inputs),
        parameters=tensors.profiles(),
        graph_hash=graph_hash,
    )


class Estimator:
    """Costs of a node by the roofline, in the place of a `NodeTimer`."""

    def __init__(self, spec: DeviceSpec) -> None:
        self._spec = spec

    def measure(
        self, call: Call, trace: Trace, tensors: Sequence[Tensor], own: Mapping[str, Tensor], budget_s: float
    ) -> Timing:
        """One run on fake tensors, operator by operator."""
        trial = Trial(call=call, trace=trace, tensors=tensors, own=own)
        with call.with_own(own):
            trial.make_grads(trial.forward(trial.arguments()))
            with RooflineClock(self._spec) as clock:
                forward_us, backward_us = trial.run(clock)
        workspace_bytes = trial.given_bytes + trial.asked_bytes if trial.is_differentiated else 0
        return Timing(
            forward_us=forward_us, backward_us=backward_us, workspace_bytes=workspace_bytes, spread=0.0, num_repeats=0
        )


def _fake(value: Any) -> Any:
    """A tensor of the same shape, without values."""
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_CPU)
    return made.requires_grad_(value.requires_grad)
