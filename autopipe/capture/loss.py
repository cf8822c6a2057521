"""The loss as part of the graph: a user's `loss_fn` as one node, or the loss that the model itself returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.errors import CaptureError, ConfigError

LOSS_MODULE = "_autopipe_loss"

LossFunction = Callable[[Any, Any], Tensor]


class LossModule(nn.Module):
    """Calls `loss_fn(output, target)` on flattened values. The function is kept whole: its Python runs at every
    micro-batch."""

    def __init__(self, loss_fn: LossFunction, out_spec: pytree.TreeSpec, target_spec: pytree.TreeSpec) -> None:
        super().__init__()
        if isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters()):
            raise ConfigError(
                f"a loss function {type(loss_fn).__name__} with parameters of its own",
                expected="a loss function without parameters",
                where="loss_fn",
                remedy="make it a submodule of the model and return the loss from the model's forward",
            )
        self._loss_fn = (
            loss_fn,
        )  # in a tuple, so that the buffers of a loss module stay out of the model's state dict
        self._out_spec, self._target_spec = out_spec, target_spec

    def forward(self, outputs: list[Any], targets: list[Any]) -> Tensor:
        output = pytree.tree_unflatten(outputs, self._out_spec)
        loss = self._loss_fn[0](output, pytree.tree_unflatten(targets, self._target_spec))
        if not (isinstance(loss, Tensor) and loss.dim() == 0):
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ConfigError(
                f"loss_fn returned {got}",
                expected="a scalar tensor",
                where="loss_fn",
                remedy="reduce the loss, for example by .mean()",
            )
        return loss


def find_loss(output: Any, leaves: list[Any]) -> int | None:
    """Position of the model's own loss among the flattened output: `output.loss`, `output["loss"]`, or a scalar
    output."""
    loss: Any = None
    if isinstance(output, Tensor):
        loss = output
    elif isinstance(output, Mapping):
        loss = output.get("loss")
    elif hasattr(output, "loss") or dataclasses.is_dataclass(output):
        loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        return None
    return next((i for i, leaf in enumerate(leaves) if leaf is loss), None)


def no_loss(output: Any) -> CaptureError:
    """The error for a model that is to be trained and gives no loss."""
    return CaptureError(
        f"no loss: the model returns {describe(output)}",
        expected="a scalar output, `output.loss`, `output['loss']`, or a loss function",
        remedy="pass loss_fn=lambda output, target: ... to autopipe.pipeline() and target=... to train_batch()",
    )


def describe(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {', '.join(map(repr, value))}"
    return f"a {type(value).__name__}"
