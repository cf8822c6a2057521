"""Batches and their micro-batches: tensors whose first dimension is the batch's are split, all else goes to each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopipe.errors import ConfigError


class Batch(NamedTuple):
    """The positional arguments, keyword arguments and target of a call of the engine."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Any

    def to(self, device: torch.device) -> Batch:
        """The batch with all of its tensors on a device."""
        parts = (self.args, dict(self.kwargs), self.target)
        return Batch(*pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, parts))

    def for_model(self, *, has_loss_fn: bool) -> Batch:
        """The batch as the model takes it: without a loss function the target is an argument of that name."""
        if has_loss_fn or self.target is None:
            return self
        return Batch(self.args, {**self.kwargs, "target": self.target}, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One micro-batch: how the model is called with it, its target, and its number of samples.

    Attributes:
        leaves, spec: the flattened (args, kwargs, target), and their structure.
        num_inputs: leaves before those of the target.
        num_samples: samples in it.
        signature: what a captured graph depends on: structure, shapes, dtypes, and the values that are no tensors.
    """

    leaves: Sequence[Any]
    spec: pytree.TreeSpec
    num_inputs: int
    num_samples: int
    signature: str

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments of the model."""
        return self._parts()[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of the model."""
        return self._parts()[1]

    @property
    def target(self) -> Any:
        """The target of the loss function."""
        return self._parts()[2]

    def _parts(self) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        parts: tuple[tuple[Any, ...], dict[str, Any], Any] = pytree.tree_unflatten(self.leaves, self.spec)
        return parts

    def tensors(self, with_target: bool) -> list[Tensor]:
        """The tensors in the order in which a captured graph takes them."""
        given = self.leaves if with_target else self.leaves[: self.num_inputs]
        return [leaf for leaf in given if isinstance(leaf, Tensor)]

    def template(self) -> MicroBatch:
        """A micro-batch of the same signature without its values, small enough to send."""

        def empty(leaf: Any) -> Any:
            return torch.zeros((), dtype=leaf.dtype).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf

        return dataclasses.replace(self, leaves=[empty(leaf) for leaf in self.leaves])


def _signature(leaves: Sequence[Any], spec: pytree.TreeSpec) -> str:
    described = [
        (tuple(v.shape), str(v.dtype), v.requires_grad) if isinstance(v, Tensor) else (type(v).__name__, repr(v))
        for v in leaves
    ]
    return f"{spec}|{described}"


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> int:
    """The number of samples: the first dimension of the first tensor that has dimensions.

    Raises:
        ConfigError: there is no such tensor, or the batch is empty.
    """
    return _size(pytree.tree_leaves((args, dict(kwargs), target)))


def _size(leaves: Sequence[Any]) -> int:
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            if leaf.shape[0] == 0:
                raise ConfigError(
                    "a batch of size 0",
                    expected="at least one sample",
                    where="the batch",
                    remedy="skip empty batches, or set drop_last in the loader",
                )
            return leaf.shape[0]
    raise ConfigError(
        "a batch without tensors",
        expected="at least one tensor whose first dimension is the batch",
        where="the batch",
        remedy="pass the batch to the call",
    )


def split(args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any, num_microbatches: int) -> list[MicroBatch]:
    """Split a batch into micro-batches of nearly equal size, at most one for each sample.

    Every tensor whose first dimension equals the batch size is split along it; all else goes to every micro-batch.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs), target))
    size = _size(leaves)
    count = min(num_microbatches, size)
    pieces: list[list[Any]] = [
        list(torch.tensor_split(leaf, count))
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
        else [leaf] * count
        for leaf in leaves
    ]
    num_inputs = len(leaves) - len(pytree.tree_leaves(target))
    result: list[MicroBatch] = []
    signatures: dict[int, str] = {}  # micro-batches of one size have one signature
    for i, part in enumerate(zip(*pieces, strict=True)):
        num_samples = size // count + (1 if i < size % count else 0)
        if num_samples not in signatures:
            signatures[num_samples] = _signature(part, spec)
        result.append(
            MicroBatch(
                leaves=part,
                spec=spec,
                num_inputs=num_inputs,
                num_samples=num_samples,
                signature=signatures[num_samples],
            )
        )
    return result


def raw_weights(microbatches: list[MicroBatch], loss_weight: Callable[[Any], float | Tensor] | None) -> list[float]:
    """The weight of each micro-batch: its number of samples, or what the user's function says."""
    if loss_weight is None:
        return [float(m.num_samples) for m in microbatches]
    return [float(loss_weight(m.target if m.target is not None else m.kwargs)) for m in microbatches]


def normalised(raw: list[float], total: float) -> list[float]:
    """Weights as shares of the total over the whole batch.

    Raises:
        ConfigError: a weight is negative, or all are zero.
    """
    if min(raw, default=0.0) < 0 or not total > 0:
        raise ConfigError(
            f"micro-batch weights {raw}",
            expected="numbers that are not negative, not all 0",
            where="loss_weight",
            remedy="return the number of counted labels",
        )
    return [w / total for w in raw]


def check_device(microbatch: MicroBatch, device: torch.device) -> None:
    """Raise a ConfigError if a tensor of the batch lies on another kind of device than the engine."""
    if all(not isinstance(leaf, Tensor) or leaf.device.type == device.type for leaf in microbatch.leaves):
        return
    given = (("args", microbatch.args), ("kwargs", microbatch.kwargs), ("target", microbatch.target))
    for name, value in given:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.device.type != device.type:
                raise ConfigError(
                    f"a batch on device {leaf.device}",
                    expected=f"device {device}",
                    where=f"{name} of the batch",
                    remedy=f"move it with .to({str(device)!r}) before the call, "
                    f"or pass device={str(leaf.device)!r} to pipeline()",
                )
