"""The values that flow along the edges of a graph while it is profiled: what is known of each, and real ones on
demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from profiler.tensors import fill_random


@dataclass(slots=True, eq=False)
class Storage:
    """One piece of memory, whichever tensors look at it.

    Attributes:
        num_bytes: its size.
        owner: name of the compute node that created it; None for parameters, buffers and model inputs.
        saved: whether it is already counted as held for backward.
        base: the memory itself, where something real was computed or made up.
        param: the name of the parameter or buffer whose memory it is.
    """

    num_bytes: int
    owner: str | None
    saved: bool = False
    base: torch.UntypedStorage | None = None
    param: str | None = None


@dataclass(slots=True, eq=False)
class Value:
    """A tensor of the graph. `real` is None while no node that has to run has asked for it.

    Attributes:
        storage: the memory that it looks at.
        shape, stride, offset, dtype: how it looks at it.
        requires_grad: whether it gets a gradient.
        target: the dotted path in the model, for a parameter or buffer.
        real: the tensor.
        is_exact: floats that were computed from indices, masks and constants alone: they count or place something, and
            random numbers may not stand for them.
    """

    storage: Storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    requires_grad: bool
    target: str | None = None
    real: Tensor | None = None
    is_exact: bool = False

    @property
    def is_float(self) -> bool:
        """Whether it holds real or complex numbers."""
        return self.dtype.is_floating_point or self.dtype.is_complex


def value_of(tensor: Tensor, storage: Storage, target: str | None = None) -> Value:
    """The value that a real tensor is."""
    strided = tensor.layout == torch.strided
    return Value(
        storage,
        tuple(tensor.shape),
        tuple(tensor.stride()) if strided else (),
        int(tensor.storage_offset()) if strided else 0,
        tensor.dtype,
        tensor.requires_grad,
        target,
        tensor,
    )


class _Continue(torch.autograd.Function):
    """A tensor as if a node had computed it: not a leaf, so that it may be written to, and with no graph behind it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, token: Tensor) -> Tensor:
        return tensor.data  # not a view in autograd's eyes, with a version counter of its own

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None]:
        return None, None


def cut_from_graph(tensor: Tensor) -> Tensor:
    """The same data without the autograd graph that led to it, which holds on to the parameters that it read."""
    if not tensor.requires_grad:
        return tensor
    token = torch.zeros((), requires_grad=True)
    with torch.enable_grad():
        return _Continue.apply(tensor.detach(), token)  # type: ignore[no-any-return,no-untyped-call]


def make_real(value: Value, device: torch.device) -> Tensor:
    """The tensor of a value, made up with random numbers where it was never computed."""
    if value.real is not None:
        return value.real
    storage = value.storage
    if storage.base is None:
        flat = torch.empty(-(-storage.num_bytes // value.dtype.itemsize), dtype=value.dtype, device=device)
        storage.base = fill_random(flat).untyped_storage()
    tensor = torch.empty(0, dtype=value.dtype, device=device)
    tensor.set_(storage.base, value.offset, value.shape, value.stride)
    if value.requires_grad:
        tensor = cut_from_graph(tensor.requires_grad_())
    value.real = tensor
    return tensor


def storages_of(tensor: Tensor) -> Sequence[torch.UntypedStorage]:
    """The memory behind a tensor: one storage, two or more for a sparse one."""
    if tensor.layout == torch.strided:
        return (tensor.untyped_storage(),)
    if tensor.layout == torch.sparse_coo:
        return tensor._indices().untyped_storage(), tensor._values().untyped_storage()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = tensor.crow_indices(), tensor.col_indices(), tensor.values()
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    else:
        return ()
    return tuple(p.untyped_storage() for p in parts)
