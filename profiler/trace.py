"""Trace of running a node: its outputs, the memory they look at, and what was kept for backward, free of any tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from profiler.call import Call
from profiler.memory import SavedTensors, new_storages
from profiler.values import Storage, Value, storages_of, value_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorOutput:
    """One tensor that a node returns.

    Attributes:
        memory: which memory it looks at: n ≥ 0 the n-th of the call's `sources`, n < 0 the (-1 - n)-th new one.
        shape, stride, offset, dtype, requires_grad: the tensor.
    """

    memory: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    requires_grad: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements: what sending it would move."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The effects of a node, the same for every node of the same signature.

    Attributes:
        spec: the structure of its output.
        leaves: the leaves of its output: `TensorOutput`, or another value as it is.
        new_bytes: the sizes of the storages that it made and returned.
        saved: the memory kept for backward, numbered as in `TensorOutput.memory`.
        saved_inside_bytes: memory kept for backward that is neither argument nor output (a dropout mask).
        written: numbers of the argument tensors that it wrote to.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    new_bytes: tuple[int, ...]
    saved: tuple[int, ...]
    saved_inside_bytes: int
    written: tuple[int, ...]

    @property
    def outputs(self) -> list[TensorOutput]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorOutput)]

    @property
    def gives_floats(self) -> bool:
        """Whether its output is floats alone: random numbers may stand for most, not for indices and Python values."""
        return bool(self.outputs) and all(
            leaf is None or (isinstance(leaf, TensorOutput) and (leaf.dtype.is_floating_point or leaf.dtype.is_complex))
            for leaf in self.leaves
        )


def run_traced(call: Call, tensors: Sequence[Tensor], own: Mapping[str, Tensor]) -> tuple[Any, Trace]:
    """Runs a node once, for real; its output, with the autograd graph and without what that graph saved, and the
    trace."""
    versions = [t._version for t in tensors]
    saved = SavedTensors()
    args, kwargs = call.bind(tensors)
    with call.with_own(own), saved.collecting():
        output = call.function(*args, **kwargs)
    places: dict[int, int] = {}
    sources = call.sources
    for value, tensor in zip((*call.values, *call.own.values()), (*tensors, *own.values()), strict=True):
        for storage in storages_of(tensor):
            places.setdefault(storage._cdata, sources.index(value.storage))
    leaves, spec = pytree.tree_flatten(output)
    new = new_storages([t for t in leaves if isinstance(t, Tensor)], places.__contains__)
    places |= {s._cdata: -1 - i for i, s in enumerate(new)}
    kept = saved.storages()
    trace = Trace(
        spec=spec,
        leaves=tuple(_leaf(leaf, places) for leaf in leaves),
        new_bytes=tuple(s.nbytes() for s in new),
        saved=tuple(places[s._cdata] for s in kept if s._cdata in places),
        saved_inside_bytes=sum(s.nbytes() for s in kept if s._cdata not in places),
        written=tuple(i for i, (t, v) in enumerate(zip(tensors, versions, strict=True)) if t._version != v),
    )
    saved.drop()
    return output, trace


def _leaf(leaf: Any, places: Mapping[int, int]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    v = value_of(leaf, Storage(0, None))
    storages = storages_of(leaf)
    memory = places[storages[0]._cdata] if storages else 0
    return TensorOutput(
        memory=memory, shape=v.shape, stride=v.stride, offset=v.offset, dtype=v.dtype, requires_grad=v.requires_grad
    )


def output_values(call: Call, trace: Trace, output: Any = None) -> tuple[Any, list[Storage]]:
    """The node's output with a `Value` for each tensor, and the storages that it made.

    Args:
        call: the call.
        trace: its trace.
        output: what it returned; None where it was not run, and the values are made up when somebody asks.
    """
    new = [Storage(n, call.node.name) for n in trace.new_bytes]
    sources = call.sources
    reals = pytree.tree_leaves(output) if output is not None else [None] * len(trace.leaves)
    leaves = []
    for leaf, real in zip(trace.leaves, reals, strict=True):
        if isinstance(leaf, TensorOutput):
            storage = sources[leaf.memory] if leaf.memory >= 0 else new[-1 - leaf.memory]
            if isinstance(real, Tensor) and real.layout == torch.strided:
                storage.base = real.untyped_storage()
            leaves.append(
                Value(storage, leaf.shape, leaf.stride, leaf.offset, leaf.dtype, leaf.requires_grad, real=real)
            )
        else:
            leaves.append(leaf)
    return pytree.tree_unflatten(leaves, trace.spec), new
