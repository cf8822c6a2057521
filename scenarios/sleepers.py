"""Blocks that sleep, so that a stage takes the time that it is to take."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Nap(torch.autograd.Function):
    """The identity; forward and backward sleep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        _sleep(forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _sleep(ctx.backward_s)
        return gradient, None, None


def _sleep(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)


class Sleeper(nn.Module):
    """x + w, where the forward, the gradient of the sum and the gradient of w each sleep."""

    def __init__(self, forward_s: float, input_s: float, weight_s: float, width: int = 16) -> None:
        super().__init__()
        self.seconds = (forward_s, input_s, weight_s)
        self.w = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        forward_s, input_s, weight_s = self.seconds
        return _Nap.apply(x + _Nap.apply(self.w, 0.0, weight_s), forward_s, input_s)  # type: ignore[no-any-return]


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, the loss."""
    return F.mse_loss(output, target)
