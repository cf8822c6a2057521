"""Cases about parameters: lists, parametrizations, ties, modules that are called or named several times."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from scenarios.hard_cases.registry import WIDTH, case


def _parameter_lists(m: nn.Module) -> None:
    m.scales = nn.ParameterList([nn.Parameter(torch.ones(WIDTH) * i) for i in range(1, 4)])
    m.named = nn.ParameterDict({"a": nn.Parameter(torch.ones(WIDTH)), "b": nn.Parameter(torch.zeros(WIDTH))})


@case("ParameterList and ParameterDict", _parameter_lists)
def _(net: Any, h: Tensor) -> Any:
    for scale in net.scales:
        h = h * scale
    return h * net.named["a"] + net.named["b"]


@case("new weight_norm", lambda m: parametrizations.weight_norm(m.first) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("new spectral_norm", lambda m: parametrizations.spectral_norm(m.first) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("orthogonal parametrization", lambda m: parametrizations.orthogonal(m.first) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


def _old_spectral_norm(m: Any) -> None:
    nn.utils.spectral_norm(m.first)


@case("old spectral_norm", _old_spectral_norm)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


def _old_weight_norm(m: Any) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(m.first)


@case("old weight_norm", _old_weight_norm)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


class _Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


@case(
    "a parametrization of one's own",
    lambda m: parametrize.register_parametrization(m.first, "weight", _Symmetric()) and None,
)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("tied weights", lambda m: setattr(m.first, "weight", m.last.weight))
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("a weight used as a function's argument")
def _(net: Any, h: Tensor) -> Any:
    return F.linear(h, net.first.weight.t() * 0.5, net.first.bias)


@case("parameters().data read")
def _(net: Any, h: Tensor) -> Any:
    return h * net.first.weight.data.mean()


@case("an L2 penalty over parameters")
def _(net: Any, h: Tensor) -> Any:
    return net.last(h), sum(p.square().sum() for p in net.parameters())


@case("a module called three times")
def _(net: Any, h: Tensor) -> Any:
    for _ in range(3):
        h = net.first(h)
    return h


@case("one module under two names", lambda m: setattr(m, "alias", m.first))
def _(net: Any, h: Tensor) -> Any:
    return net.alias(h) + net.first(h)


@case("a layer outside of the model", lambda m: setattr(m, "hidden_list", [nn.Linear(WIDTH, WIDTH)]))
def _(net: Any, h: Tensor) -> Any:
    return net.hidden_list[0](h)


@case("a frozen layer", lambda m: m.second.requires_grad_(False) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.second(h)


@case("functional_call", lambda m: m.add_module("other", nn.Linear(WIDTH, WIDTH)))
def _(net: Any, h: Tensor) -> Any:
    weights = {n: p * 2 for n, p in net.other.named_parameters()}
    return torch.func.functional_call(net.other, weights, (h,))
