"""How a case is registered: a function between three layers, or a class of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
CASES: dict[str, Callable[[], Case]] = {}
WIDTH = 8


def x(*shape: int) -> Tensor:
    """The input of most cases."""
    return torch.randn(*(shape or (4, WIDTH)))


class Net(nn.Module):
    """Three linear layers around whatever `function(self, h, ...)` does, so that a cut can fall on both sides of it."""

    def __init__(self, function: Callable[..., Any], setup: Callable[[nn.Module], None] | None = None) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.function = (function,)
        if setup is not None:
            setup(self)

    def forward(self, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        h = torch.tanh(self.second(torch.tanh(self.first(value))))
        out = self.function[0](self, h, *args, **kwargs)
        return (
            self.last(out) if isinstance(out, Tensor) and out.shape[-1:] == (WIDTH,) and not out.is_complex() else out
        )


def case(name: str, setup: Callable[[nn.Module], None] | None = None, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Registers a function of (net, hidden) as a case."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        CASES[name] = lambda: (Net(function, setup), (x(), *args), kwargs)
        return function

    return register


def model_case(name: str, *shape: int) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Registers a class of modules as a case."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        CASES[name] = lambda: (cls(), (x(*shape),), {})
        return cls

    return register
