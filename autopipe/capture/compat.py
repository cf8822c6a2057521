"""The one place that knows what differs between torch versions, and which private names of torch capture leans on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@contextlib.contextmanager
def swap_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While the context is open, `module` holds `tensors` in place of its parameters and buffers of the same names.

    Each holder is changed once and put back as it was, also where a module has several names (torch's own
    `_reparametrize_module` then leaves the stand-ins in the model).
    """
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in module.modules() if not is_scripted(m)]
    done = set[tuple[int, str]]()
    try:
        for name, tensor in tensors.items():
            path, _, field = name.rpartition(".")
            owner = module.get_submodule(path)
            if is_scripted(owner) or (id(owner), field) in done:
                continue
            done.add((id(owner), field))
            (owner._parameters if field in owner._parameters else owner._buffers)[field] = tensor  # type: ignore[assignment]
        yield
    finally:
        for owner, parameters, buffers in before:
            owner._parameters.clear()
            owner._parameters.update(parameters)
            owner._buffers.clear()
            owner._buffers.update(buffers)


def is_torch_file(filename: str) -> bool:
    """Whether a source file is torch's own."""
    return filename.startswith(f"{torch.__path__[0]}/")


def is_scripted(module: nn.Module) -> bool:
    """Whether the module is torch.jit's: its parameters live outside of Python and cannot be swapped."""
    return isinstance(module, torch.jit.ScriptModule)


def compiled_original(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` wrapped, None for any other."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # slow to import; where it is not, nothing is compiled
    if dynamo is None or not isinstance(module, dynamo.OptimizedModule):
        return None
    original: nn.Module = module._orig_mod
    return original


def eager_stance() -> contextlib.AbstractContextManager[Any]:
    """While the context is open, what was given to `torch.compile` runs as plain Python."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def without_torch_function() -> contextlib.AbstractContextManager[None]:
    """Torch calls made in the context reach no torch-function mode or subclass."""
    context: contextlib.AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def storage_key(tensor: Tensor) -> int | None:
    """Identifies the storage of a tensor while it is alive; None for layouts without one storage (sparse, nested)."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return None
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # a tensor inside of vmap
        return None


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor stands for another inside of a transform of functions (`torch.vmap`, `torch.func.grad`)."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


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
def patched_vmap(call: Callable[..., Any]) -> Iterator[None]:
    """Sends every call of a function made by `torch.vmap` to `call(base, function, options, args, kwargs)`."""
    from torch._functorch import apis

    base = apis.vmap_impl

    def vmap_impl(
        func: Callable[..., Any],
        in_dims: Any,
        out_dims: Any,
        randomness: Any,
        chunk_size: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return call(base, func, (in_dims, out_dims, randomness, chunk_size), args, kwargs)

    apis.vmap_impl = vmap_impl
    try:
        yield
    finally:
        apis.vmap_impl = base


@contextlib.contextmanager
def patched_checkpoint(enter: Callable[[], None], leave: Callable[[], None]) -> Iterator[None]:
    """Calls `enter` and `leave` around the body of every non-reentrant `torch.utils.checkpoint` region.

    From torch 2.14 `checkpoint` calls a generator whose name ends in `_impl`; the older name only forwards to it.
    """
    from torch.utils import checkpoint

    name = "_checkpoint_without_reentrant_generator"
    name = f"{name}_impl" if hasattr(checkpoint, f"{name}_impl") else name
    original = getattr(checkpoint, name)

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

    setattr(checkpoint, name, generator)
    try:
        yield
    finally:
        setattr(checkpoint, name, original)
