"""Activations computed again: the same gradients, buffers and random numbers, within the memory that was promised."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopipe
from profiler.memory import peak_memory
from scenarios.pipelines import ResNet, TiedGPT, token_loss

MIB = 2.0**20


class Stateful(nn.Module):
    """What a second run could spoil: dropout, batch norm, an operation in place, buffers that the output depends on."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(6))
        self.dropout = nn.Dropout(0.3)
        for i in range(6):
            self.register_buffer(f"mean{i}", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = x + self.dropout(F.relu_(norm(layer(x))))
            mean = self.get_buffer(f"mean{i}")
            if self.training:
                mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            x = F.dropout(x - mean, 0.1, self.training)
        return x


def stateful() -> tuple[nn.Module, Tensor, Tensor, Callable[..., Tensor]]:
    return Stateful(), torch.randn(256, 32), torch.randn(256, 32), F.mse_loss


def gpt() -> tuple[nn.Module, Tensor, Tensor, Callable[..., Tensor]]:
    ids = torch.randint(0, 50, (8, 64))
    return TiedGPT(50, 64, 6, 64), ids, ids.roll(-1, 1), token_loss


def resnet() -> tuple[nn.Module, Tensor, Tensor, Callable[..., Tensor]]:
    return ResNet(16, 6), torch.randn(16, 3, 24, 24), torch.randint(0, 5, (16,)), F.cross_entropy


def trained(make: Callable[..., Any], **arguments: Any) -> tuple[nn.Module, autopipe.Engine, Tensor, int]:
    """The model after two calls, its engine, the loss, and the most bytes that the second call held beyond its
    start."""
    torch.manual_seed(0)
    model, x, target, loss_fn = make()
    engine = autopipe.pipeline(model, loss_fn=loss_fn, num_microbatches=1, seed=3, self_check=False, **arguments)
    engine.train_batch(x, target=target)
    with peak_memory(torch.device("cpu")) as peak:
        loss = engine.train_batch(x, target=target)
    return model, engine, loss, peak.num_bytes


@functools.cache
def without(make: Callable[..., object]) -> tuple[nn.Module, autopipe.Engine, Tensor, int]:
    return trained(make, recompute="none")


def limit_for(engine: autopipe.Engine, share: float) -> int:
    """A limit at which the activations have this share of what they took."""
    stage = engine.plan.stages[0]
    static = stage.param_bytes + stage.gradient_bytes + stage.optimizer_bytes
    return int(static + share * (stage.peak_bytes - static))


@pytest.mark.parametrize("make", [stateful, gpt, resnet])
@pytest.mark.parametrize("recompute", ["full", "auto"])
def test_nothing_changes_but_the_memory(make: Callable[..., object], recompute: str) -> None:
    plain, free, expected, most = without(make)
    limit = limit_for(free, 0.8 if make is stateful else 0.6)
    arguments = {"memory_limit": limit} if recompute == "auto" else {}
    model, engine, loss, held = trained(make, recompute=recompute, **arguments)
    assert engine.plan.stages[0].recompute
    assert torch.equal(loss, expected)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-9), name
    for (name, b), c in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(b, c[1]), name
    if recompute == "auto":
        stage = engine.plan.stages[0]
        static = stage.param_bytes + stage.gradient_bytes + stage.optimizer_bytes
        assert stage.peak_bytes <= limit
        assert held <= limit - static + stage.gradient_bytes, f"{held / MIB:.2f} of {(limit - static) / MIB:.2f} MiB"
        assert held < most


def test_evaluation_computes_nothing_again() -> None:
    model, engine, _, _ = trained(stateful, recompute="full")
    before = copy.deepcopy(dict(model.named_buffers()))
    x, target = torch.randn(256, 32), torch.randn(256, 32)
    assert torch.equal(engine.eval_batch(x, target=target), engine.eval_batch(x, target=target))
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers() if "norms" in n)
