"""The outputs of a prediction: micro-batches and replicas put together, from the last stages to every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopipe.engine.batch import MicroBatch
from autopipe.engine.context import Context
from autopipe.engine.layout import Layout
from autopipe.engine.stage_run import StageRun
from autopipe.errors import EngineError

Parts = list[tuple[int, list[Tensor]]]
"""For each micro-batch, its number of samples and its outputs."""


def gather_outputs(
    runs: Sequence[StageRun], microbatches: Sequence[MicroBatch], context: Context, layout: Layout
) -> list[Tensor]:
    """The graph's outputs over the whole batch, on the CPU of every rank. Collective."""
    mine: Parts | None = None
    for run in runs:
        if run.stage == layout.num_stages - 1:
            mine = [
                (microbatch.num_samples, [run.results[m][i].detach().cpu() for i in sorted(run.results[m])])
                for m, microbatch in enumerate(microbatches)
            ]
    parts = [part for rank in context.gather(mine) if rank is not None for part in rank]
    sizes = [size for size, _ in parts]
    return [_merge([outputs[i] for _, outputs in parts], sizes) for i in range(len(parts[0][1]))]


def _merge(parts: list[Tensor], sizes: list[int]) -> Tensor:
    """One output over the micro-batches."""
    if all(p.dim() > 0 and p.shape[0] == n for p, n in zip(parts, sizes, strict=True)):
        return torch.cat(parts)
    if all(p.shape == parts[0].shape and torch.equal(p, parts[0]) for p in parts[1:]):
        return parts[0]
    if parts[0].dim() == 0 and parts[0].is_floating_point():
        shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        return (torch.stack(parts).double() * shares).sum().to(parts[0].dtype)
    raise EngineError(
        f"an output of shape {tuple(parts[0].shape)} whose first dimension is not the batch's",
        expected="outputs with one row for each sample, or scalars",
        where="predict()",
        remedy="return it with the batch as dimension 0",
    )
