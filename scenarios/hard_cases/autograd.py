"""Cases that steer autograd: gradient and autocast modes, checkpoints, functions of one's own, hooks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from scenarios.hard_cases.registry import WIDTH, case, model_case

# -- modes -------------------------------------------------------------------------------------------------------------


@case("no_grad in the middle")
def _(net: Any, h: Tensor) -> Any:
    with torch.no_grad():
        weight = torch.softmax(h, -1)
    return h * weight


@case("enable_grad inside no_grad")
def _(net: Any, h: Tensor) -> Any:
    with torch.no_grad():
        a = h * 2
        with torch.enable_grad():
            b = h * 3
    return a + b


@case("a decorated no_grad function")
def _(net: Any, h: Tensor) -> Any:
    @torch.no_grad()
    def normalise(t: Tensor) -> Tensor:
        return t / t.norm(dim=-1, keepdim=True)

    return h + normalise(h)


@case("autocast inside forward")
def _(net: Any, h: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a = net.second(h) @ torch.ones(WIDTH, WIDTH)
        with torch.autocast("cpu", enabled=False):
            b = net.first(a.float())
    return b + a.float()


@case("autocast as a decorator")
def _(net: Any, h: Tensor) -> Any:
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def low(t: Tensor) -> Tensor:
        return net.first(t)

    return low(h).float()


@case("a gradient inside forward")
def _(net: Any, h: Tensor) -> Any:
    energy = net.first(h).square().sum()
    (force,) = torch.autograd.grad(energy, h, create_graph=True)
    return h - force


# -- checkpoints -------------------------------------------------------------------------------------------------------


@case("checkpoint", lambda m: m.add_module("drop", nn.Dropout(0.3)))
def _(net: Any, h: Tensor) -> Any:
    return checkpoint(lambda t: net.drop(torch.tanh(net.first(t))), h, use_reentrant=False)


@case("reentrant checkpoint", lambda m: m.add_module("drop", nn.Dropout(0.3)))
def _(net: Any, h: Tensor) -> Any:
    return checkpoint(lambda t: net.drop(torch.tanh(net.first(t))), h, use_reentrant=True)


@case("checkpoint whose code writes in place")
def _(net: Any, h: Tensor) -> Any:
    def body(t: Tensor) -> Tensor:
        t = net.first(t)
        t.mul_(2)
        t[:, 0] = 0.0
        return F.relu(t, inplace=True)

    return checkpoint(body, h, use_reentrant=False)


@case("checkpoint around batch norm", lambda m: m.add_module("norm", nn.BatchNorm1d(WIDTH)))
def _(net: Any, h: Tensor) -> Any:
    return checkpoint(lambda t: net.norm(net.first(t)), h, use_reentrant=False)


@case("nested checkpoints")
def _(net: Any, h: Tensor) -> Any:
    inner = lambda t: checkpoint(lambda u: net.first(u).sin(), t, use_reentrant=False) * 2
    return checkpoint(inner, h, use_reentrant=False)


@case("checkpoint with several outputs")
def _(net: Any, h: Tensor) -> Any:
    a, b = checkpoint(lambda t: (net.first(t), t.cos()), h, use_reentrant=False)
    return a * b


@model_case("checkpoint_sequential")
class SequentialCheckpoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))

    def forward(self, v: Tensor) -> Tensor:
        return checkpoint_sequential(self.body, 2, v, use_reentrant=False)


# -- autograd functions and hooks --------------------------------------------------------------------------------------


class Reversed(torch.autograd.Function):
    """Turns the gradient round."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -ctx.scale * gradients[0], None


class TwoOutputs(torch.autograd.Function):
    """Returns two tensors, one without gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Any:
        index = value.argmax(-1)
        ctx.mark_non_differentiable(index)
        return value * 2, index

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 5


@case("gradient reversal")
def _(net: Any, h: Tensor) -> Any:
    return Reversed.apply(h, 0.7)


@case("an autograd function with two outputs")
def _(net: Any, h: Tensor) -> Any:
    a, index = TwoOutputs.apply(h)
    return a + index[:, None]


@case("a forward hook", lambda m: m.first.register_forward_hook(lambda _m, _a, out: out * 3) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("a forward pre-hook", lambda m: m.first.register_forward_pre_hook(lambda _m, a: (a[0] + 1,)) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("a backward hook", lambda m: m.last.register_full_backward_hook(lambda _m, gi, _go: (gi[0] * 2,)) and None)
def _(net: Any, h: Tensor) -> Any:
    return h * 2


@case(
    "a hook with kwargs",
    lambda m: m.first.register_forward_pre_hook(lambda _m, a, k: ((a[0] * 2,), k), with_kwargs=True) and None,
)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


def _keeps(module: nn.Module) -> None:
    module.features = []  # type: ignore[assignment]
    module.first.register_forward_hook(lambda _m, _a, out: module.features.append(out.detach().mean().item()))  # type: ignore[operator,union-attr]


@case("a hook that keeps features", _keeps)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("a hook on the whole model", lambda m: m.register_forward_hook(lambda _m, _a, out: out * 2) and None)
def _(net: Any, h: Tensor) -> Any:
    return h


@case("a pre-hook on the whole model", lambda m: m.register_forward_pre_hook(lambda _m, a: (a[0] * 2,)) and None)
def _(net: Any, h: Tensor) -> Any:
    return h


@case("a tensor hook in forward")
def _(net: Any, h: Tensor) -> Any:
    y = h * 1
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
    return y


@case("a hook on a parameter", lambda m: m.first.weight.register_hook(lambda g: g * 3) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)
