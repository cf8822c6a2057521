"""A module or function that is kept whole, run once on made-up tensors, so that the shapes of what it gives are
known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree

from autopipe.capture.compat import is_scripted, swap_parameters
from autopipe.capture.objects import map_tensors, plain_values, tensors_inside
from autopipe.capture.reading import Untraceable, Varies


def run_module(
    original: Callable[..., Any],
    module: nn.Module,
    real: dict[str, Tensor],
    args: Any,
    kwargs: Any,
    fake_mode: FakeTensorMode,
) -> Any:
    """The fake twin of what a module gives; `real`: its parameters and buffers by name (those of scripted modules are
    left)."""
    scripted = tuple(f"{n}." if n else "" for n, m in module.named_modules() if is_scripted(m))
    tensors = {n: t for n, t in real.items() if not (scripted and n.startswith(scripted))}
    own_grad = any(p.requires_grad for p in module.parameters())

    def run(a: Any, k: Any) -> Any:
        with swap_parameters(module, tensors):
            return original(module, *a, **k)

    return real_like(run, args, kwargs, fake_mode, own_grad)


def real_like(
    function: Callable[[Any, Any], Any], args: Any, kwargs: Any, fake_mode: FakeTensorMode, own_grad: bool = False
) -> Any:
    """The fake twin of what `function(args, kwargs)` gives on real tensors of the same shapes, made up.

    Which path the function takes depends on the values, so its floating-point outputs count as differentiable wherever
    an input is, or where `own_grad` says that it has trained parameters of its own.

    Raises:
        Untraceable: the function puts other tensors into an object that it is given, or the shapes depend on the
            values.
    """
    grad = torch.is_grad_enabled() and (own_grad or any(t.requires_grad for t in tensors_inside((args, kwargs))))
    with unset_fake_temporarily():
        out = _run_made_up(function, args, kwargs)
        shapes = [t.shape for t in tensors_inside(out)]
        if shapes != [t.shape for t in tensors_inside(_run_made_up(function, args, kwargs))]:
            raise Untraceable("shapes that depend on the values of tensors")

        out = map_tensors(lambda t: t.detach().requires_grad_(grad and (t.is_floating_point() or t.is_complex())), out)
    numbers = [v for v in pytree.tree_leaves(out) if isinstance(v, (bool, int, float, complex))]
    if numbers:
        raise Untraceable(f"a Python value ({numbers[0]!r}) that a module gives which reads values of tensors")
    return map_tensors(lambda t: fake_mode.from_tensor(t, static_shapes=True), out)


def _run_made_up(function: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> Any:
    given = map_tensors(materialise, (args, kwargs))
    before = [(id(t), t._version) for t in tensors_inside(given)]
    out = function(*given)
    if [(id(t), t._version) for t in tensors_inside(given)] != before:
        raise Untraceable("a change of the tensors that a module is given, by a module that is kept whole")
    return out


def what_varies(function: Callable[..., Any], owner: nn.Module, args: Any, kwargs: Any, out: Any) -> Varies:
    """Whether `function(*args, **kwargs)`, which gave `out`, gives other shapes or numbers for its inputs in another
    order, larger, or zero.

    Where it fails for these, its shapes count as varying. The buffers of `owner` are put back.
    """
    shapes, numbers = [t.shape for t in tensors_inside(out)], plain_values(out)
    buffers = [(b, b.detach().clone()) for b in owner.buffers()]
    found = Varies(shapes=False, numbers=False)
    try:
        with torch.random.fork_rng(devices=[]):
            for scale in (1, 1, 10, 0):
                other_args, other_kwargs = map_tensors(partial(_shuffled, scale=scale), (args, kwargs))
                other = function(*other_args, **other_kwargs)
                found = Varies(
                    shapes=found.shapes or [t.shape for t in tensors_inside(other)] != shapes,
                    numbers=found.numbers or plain_values(other) != numbers,
                )
        return found
    except Exception:  # noqa: BLE001 (code that cannot take other values has no known shapes for them)
        return found._replace(shapes=True)
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _shuffled(tensor: Tensor, scale: int) -> Tensor:
    """The values of a tensor of numbers in another order and times `scale`; whole numbers, which may be indices, as
    they are."""
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        return tensor.detach().clone()
    value = tensor.detach().flatten()[torch.randperm(tensor.numel(), device=tensor.device)].view(tensor.shape) * scale
    value = value.to(tensor.dtype)
    return value.requires_grad_(tensor.requires_grad)


def materialise(tensor: Tensor) -> Tensor:
    """A real tensor like a fake one, with made-up values."""
    if not isinstance(tensor, FakeTensor) and tensor.device.type != "meta":
        return tensor
    device = torch.device("cpu") if tensor.device.type == "meta" else tensor.device
    if tensor.is_floating_point() or tensor.is_complex():
        value = torch.randn(tensor.shape, dtype=tensor.dtype, device=device).requires_grad_(tensor.requires_grad)
        return value if tensor.is_leaf or not tensor.requires_grad else value.clone()
    return torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
