"""Cases about what goes into the model and comes out."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scenarios.hard_cases.registry import WIDTH, case

Pair = namedtuple("Pair", ["left", "right"])


@case("keyword-only arguments", None, scale=0.5, shift=None)
def _(net: Any, h: Tensor, *, scale: float, shift: Any = None) -> Any:
    return h * scale if shift is None else h + shift


@case("tensors in **kwargs", None, a=torch.ones(WIDTH), b={"c": torch.ones(WIDTH)})
def _(net: Any, h: Tensor, **extra: Any) -> Any:
    return h * extra["a"] + extra["b"]["c"]


@case("a nested output")
def _(net: Any, h: Tensor) -> Any:
    return {"a": [h, (h + 1, None)], "b": Pair(h * 2, 3), "c": "text", "d": OrderedDict(e=h.sum())}


@case("an output that is an input", None, torch.ones(4))
def _(net: Any, h: Tensor, other: Tensor) -> Any:
    return net.last(h), other


@case("the same output twice")
def _(net: Any, h: Tensor) -> Any:
    y = net.last(h)
    return y, y, y.view(-1)


@case("an output that is a parameter")
def _(net: Any, h: Tensor) -> Any:
    return net.last(h), net.first.weight


@case("integer inputs", None, torch.tensor([1, 0, 2, 1]))
def _(net: Any, h: Tensor, index: Tensor) -> Any:
    return h[index] + F.one_hot(index, WIDTH)


@case("a list of tensors as input", None, [torch.ones(WIDTH), torch.zeros(WIDTH)])
def _(net: Any, h: Tensor, many: list[Tensor]) -> Any:
    return h + torch.stack(many).sum(0)


@case("an input that needs gradients", None, torch.ones(4, WIDTH, requires_grad=True))
def _(net: Any, h: Tensor, other: Tensor) -> Any:
    return h * other
