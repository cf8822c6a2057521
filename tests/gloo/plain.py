"""The reference: the same model in one plain PyTorch process, micro-batch by micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def plain_step(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, loss_fn: Any, num_microbatches: int
) -> float:
    """Adds the gradients of one batch to the model's; returns the mean loss. Samples weigh equally."""
    size = args[0].shape[0]
    count = min(num_microbatches, size)

    def parts(value: Any) -> list[Any]:
        return list(torch.tensor_split(value, count)) if isinstance(value, Tensor) else [value] * count

    total = 0.0
    split_args, split_kwargs, split_target = (
        [parts(a) for a in args],
        {k: parts(v) for k, v in kwargs.items()},
        parts(target),
    )
    for i in range(count):
        output = model(*(a[i] for a in split_args), **{k: v[i] for k, v in split_kwargs.items()})
        loss = loss_fn(output, split_target[i]) if loss_fn is not None else output["loss"]
        share = loss * (split_args[0][i].shape[0] / size)
        share.backward()
        total += float(share.detach())
    return total


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))
