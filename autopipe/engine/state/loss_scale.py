"""Loss scaling for fp16, agreed on by all ranks: an overflow anywhere skips the step everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from autopipe.engine.transport.p2p import Transport


@dataclass(slots=True, kw_only=True)
class LossScale:
    """Dynamic loss scaling with the constants of `torch.amp.GradScaler`.

    Attributes:
        scale: losses are multiplied by it; 1: no scaling.
        growth_interval: steps without overflow after which it doubles; an overflow halves it. 0: it never changes.
        good_steps: steps without overflow since it last changed.
    """

    scale: float = 1.0
    growth_interval: int = 0
    good_steps: int = 0

    @classmethod
    def for_precision(cls, precision: str) -> LossScale:
        """Scaling for fp16, none otherwise."""
        return cls(scale=2.0**16, growth_interval=2000) if precision == "fp16" else cls()

    def unscale(self, parameters: Sequence[nn.Parameter], transport: Transport) -> bool:
        """Divide gradients by the scale; return whether those of all ranks are finite. Collective under fp16."""
        if not self.growth_interval:
            return True
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, 1.0 / self.scale)
        overflow = torch.tensor(float(any(not bool(torch.isfinite(g).all()) for g in gradients)))
        transport.all_reduce(overflow, dist.ReduceOp.MAX)
        return not bool(overflow)

    def update(self, finite: bool) -> None:
        """Halve the scale after an overflow; double it after a long time without one."""
        if not self.growth_interval:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0
