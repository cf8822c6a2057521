"""Compare the plain model's step with the pipeline's and list every difference, the worst first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from autopipe.verify.plain import PlainStep
from autopipe.verify.ranks import RankStep, result_file

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
TOLERANCE_OF_16_BITS = 1e-2
SMALL = 1e-3
"""A gradient below this share of the model's largest is compared with that share: below it, rounding of zeros is not an
error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One compared value: its relative error, the largest difference over the largest element; a remark if there is
    none.

    Attributes:
        stage: the stage that has it, -1 for the whole model.
    """

    kind: Literal["loss", "gradient", "buffer"]
    name: str
    stage: int
    error: float
    tolerance: float
    remark: str = ""

    @property
    def equal(self) -> bool:
        """Within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """All that was compared, the worst first."""

    differences: tuple[Difference, ...]
    num_stages: int
    num_microbatches: int
    loss: float
    plain_loss: float
    surrogate: bool
    without_dropout: bool
    num_unsaved_buffers: int

    @property
    def faults(self) -> tuple[Difference, ...]:
        """The differences beyond their tolerance."""
        return tuple(d for d in self.differences if not d.equal)

    @property
    def equal(self) -> bool:
        """Return whether the pipeline computes what the plain model computes."""
        return not self.faults


def compare(
    plain: PlainStep, ranks: Sequence[RankStep], directory: Path, tolerance: float | None, *, num_stages: int
) -> Verification:
    """Compare the loss of every rank, every gradient on every stage that has it, and every buffer."""
    loss_error = max(abs(rank.loss - plain.loss) for rank in ranks) / max(abs(plain.loss), 1e-12)
    limit = TOLERANCES[torch.float32] if tolerance is None else tolerance
    found = [Difference(kind="loss", name="loss", stage=-1, error=_number(loss_error), tolerance=limit)]
    largest = max((_size(g) for g in plain.gradients.values() if g is not None), default=0.0)
    seen: set[str] = set()
    for rank in range(len(ranks)):
        saved = torch.load(result_file(directory, rank), weights_only=True)
        for name, gradient in saved["gradients"].items():
            seen.add(name)
            stage = saved["stages"][name]
            found.append(_gradient(name, stage, gradient, plain.gradients.get(name), SMALL * largest, tolerance))
        if rank == 0:
            found += _buffers(plain, saved["state"], tolerance)
    for name in plain.gradients.keys() - seen:
        found.append(_fault("gradient", name, -1, "on no stage"))
    return Verification(
        differences=tuple(sorted(found, key=lambda d: -d.error / d.tolerance if d.tolerance else -d.error)),
        num_stages=num_stages,
        num_microbatches=plain.num_microbatches,
        loss=ranks[0].loss,
        plain_loss=plain.loss,
        surrogate=plain.mode.surrogate,
        without_dropout=plain.mode.without_dropout,
        num_unsaved_buffers=plain.num_unsaved_buffers,
    )


def _gradient(
    name: str, stage: int, got: Tensor | None, expected: Tensor | None, floor: float, tolerance: float | None
) -> Difference:
    if got is None and expected is None:
        return Difference(kind="gradient", name=name, stage=stage, error=0.0, tolerance=0.0, remark="no gradient")
    if got is None or expected is None:
        return _fault("gradient", name, stage, f"no gradient in the {'pipeline' if got is None else 'plain model'}")
    return _difference("gradient", name, stage, got, expected, floor, tolerance)


def _buffers(plain: PlainStep, state: dict[str, Tensor], tolerance: float | None) -> list[Difference]:
    found = []
    for name, expected in plain.buffers.items():
        if name not in state:
            found.append(_fault("buffer", name, -1, "not in the pipeline's state"))
        else:
            found.append(_difference("buffer", name, -1, state[name], expected, 0.0, tolerance))
    return found


def _difference(
    kind: Literal["gradient", "buffer"],
    name: str,
    stage: int,
    got: Tensor,
    expected: Tensor,
    floor: float,
    tolerance: float | None,
) -> Difference:
    if got.shape != expected.shape:
        return _fault(kind, name, stage, f"shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    own = TOLERANCES.get(expected.dtype, TOLERANCE_OF_16_BITS) if expected.is_floating_point() else 0.0
    a, b = got.to_dense().double(), expected.to_dense().double()
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    size = max(_size(expected), floor, 1e-30)
    error = _number(float(apart.max()) / size if apart.numel() else 0.0)
    return Difference(kind=kind, name=name, stage=stage, error=error, tolerance=own if tolerance is None else tolerance)


def _fault(kind: Literal["gradient", "buffer"], name: str, stage: int, remark: str) -> Difference:
    return Difference(kind=kind, name=name, stage=stage, error=math.inf, tolerance=0.0, remark=remark)


def _size(value: Tensor) -> float:
    """The largest finite element."""
    return float(value.detach().to_dense().double().abs().nan_to_num(0.0, 0.0, 0.0).max()) if value.numel() else 0.0


def _number(error: float) -> float:
    return math.inf if math.isnan(error) else error
