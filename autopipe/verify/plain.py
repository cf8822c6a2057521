"""The reference: loss, gradients and buffers of the plain model for one batch, by micro-batches in this process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from autopipe.capture.loss import describe, find_loss
from autopipe.engine.step.microbatch import MicroBatch, normalised, raw_weights, split
from autopipe.errors import ConfigError

STATE_FILE = "start.pt"
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMode:
    """Loss and dropout of the step on both sides: a surrogate loss or the model's own, dropout off or not."""

    surrogate: bool
    without_dropout: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainStep:
    """Results of the plain model; the gradient of a parameter that got none is None."""

    mode: StepMode
    num_microbatches: int
    loss: float
    gradients: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor]
    num_unsaved_buffers: int


def surrogate_loss(output: Any, _target: Any = None) -> Tensor:
    """A fixed loss on the floating outputs: a weighted mean and half the mean square, so that every element has its own
    gradient."""
    total: Tensor = torch.zeros(())
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            flat = leaf.float().flatten()
            ramp = torch.cos(0.7 * torch.arange(flat.numel(), device=flat.device, dtype=torch.float32))
            total = total.to(flat.device) + (flat * ramp).mean() + 0.5 * flat.square().mean()
    return total


def plain_step(build: Callable[[], Any], num_microbatches: int, directory: Path) -> PlainStep:
    """Build the model, save the state that the ranks start from, and run the step.

    Raises:
        ConfigError: the model has neither a loss nor floating outputs, or is random even with dropout off.
    """
    seed_all(SEED)
    model, args, kwargs = build()
    with _one_thread():
        microbatches = split(args, kwargs, None, num_microbatches)
        torch.save({"state": model.state_dict(), "args": args, "kwargs": dict(kwargs)}, directory / STATE_FILE)
        mode = _mode(model, microbatches[0])
        model.load_state_dict(torch.load(directory / STATE_FILE, weights_only=False)["state"])
        loss = _backward(model, microbatches, mode)
    persistent = model.state_dict().keys()
    buffers = dict(model.named_buffers())
    return PlainStep(
        mode=mode,
        num_microbatches=len(microbatches),
        loss=loss,
        gradients={n: p.grad for n, p in model.named_parameters() if p.requires_grad},
        buffers={n: b for n, b in buffers.items() if n in persistent},
        num_unsaved_buffers=len(buffers.keys() - persistent),
    )


def seed_all(seed: int) -> None:
    """Python's, numpy's and torch's random state."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def without_dropout(model: nn.Module) -> None:
    """Put every module in evaluation mode but those whose running statistics a training step updates."""
    for module in model.modules():
        module.training = module.training and isinstance(module, _NormBase)


def _mode(model: nn.Module, microbatch: MicroBatch) -> StepMode:
    output, random_ = _forward(model, microbatch)
    if random_:
        without_dropout(model)
        if _forward(model, microbatch)[1]:
            raise ConfigError(
                "a model that draws random numbers even in evaluation mode",
                expected="the same result for the same batch",
                where="verify",
                remedy="give verify a factory whose model is deterministic, or draw the noise outside of it and "
                "pass it in",
            )
    leaves = pytree.tree_leaves(output)
    surrogate = find_loss(output, leaves) is None
    if surrogate and not any(isinstance(v, Tensor) and v.is_floating_point() for v in leaves):
        raise ConfigError(
            f"a model that returns {describe(output)}, without a floating tensor",
            expected="a loss, or outputs that a loss can be computed from",
            where="verify",
            remedy="let the factory's model return its loss or its logits",
        )
    return StepMode(surrogate=surrogate, without_dropout=random_)


def _forward(model: nn.Module, microbatch: MicroBatch) -> tuple[Any, bool]:
    """The output, and whether random numbers were drawn for it."""
    before = torch.get_rng_state()
    with torch.no_grad():
        output = model(*microbatch.args, **microbatch.kwargs)
    return output, not torch.equal(before, torch.get_rng_state())


def _backward(model: nn.Module, microbatches: list[MicroBatch], mode: StepMode) -> float:
    raw = raw_weights(microbatches, None)
    shares, total = normalised(raw, sum(raw)), 0.0
    for microbatch, share in zip(microbatches, shares, strict=True):
        output = model(*microbatch.args, **microbatch.kwargs)
        if mode.surrogate:
            loss = surrogate_loss(output)
        else:
            leaves = pytree.tree_leaves(output)
            loss = leaves[find_loss(output, leaves) or 0]
        (loss * share).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) * share
    return total


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use as many threads as the ranks have, so that sums have the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
