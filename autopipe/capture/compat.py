"""The one place that knows what differs between torch versions, and which private names of torch capture leans on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree


def swap_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
    """While the context is open, `module` holds `tensors` in place of its parameters and buffers of the same names."""
    return _reparametrize_module(module, dict(tensors), tie_weights=False)


def without_torch_function() -> contextlib.AbstractContextManager[None]:
    """Torch calls made in the context reach no torch-function mode or subclass."""
    context: contextlib.AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def storage_key(tensor: Tensor) -> int | None:
    """Identifies the storage of a tensor while it is alive; None for layouts without one storage (sparse, nested)."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return None
    return int(tensor.untyped_storage()._cdata)


def register_dataclass(cls: type) -> None:
    """Makes a dataclass a pytree node, so that tensors in its fields are seen."""
    if cls not in pytree.SUPPORTED_NODES:
        pytree.register_dataclass(cls)


@contextlib.contextmanager
def compiling_flag(value: bool) -> Iterator[None]:
    """Sets what `torch.compiler.is_compiling()` answers: model code picks traceable branches by it."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = value
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@contextlib.contextmanager
def patched_function_apply(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replaces `torch.autograd.Function.apply` by `make(base)`, where `base(cls, *args)` is what it was.

    In torch 2.13 `apply` is a classmethod of `Function`; from 2.14 it is inherited from the C base class.
    """
    function = torch.autograd.Function
    own = function.__dict__.get("apply")

    def base(cls: type, *args: Any, **kwargs: Any) -> Any:
        bound = own.__get__(None, cls) if own is not None else super(function, cls).apply  # type: ignore[misc]
        return bound(*args, **kwargs)

    function.apply = classmethod(make(base))  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        if own is None:
            del function.apply
        else:
            function.apply = own  # type: ignore[method-assign]


@contextlib.contextmanager
def patched_checkpoint(enter: Callable[[], None], leave: Callable[[], None]) -> Iterator[None]:
    """Calls `enter` and `leave` around the body of every non-reentrant `torch.utils.checkpoint` region."""
    from torch.utils import checkpoint

    original = checkpoint._checkpoint_without_reentrant_generator

    def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        inner = original(*args, **kwargs)
        next(inner)
        enter()
        try:
            yield
        finally:
            leave()
        with contextlib.suppress(StopIteration):
            next(inner)

    checkpoint._checkpoint_without_reentrant_generator = generator
    try:
        yield
    finally:
        checkpoint._checkpoint_without_reentrant_generator = original
