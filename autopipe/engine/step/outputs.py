"""The outputs of a prediction, put together on the last stage and sent to all ranks that want them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopipe.engine.ranks.mesh import ProcessMesh
from autopipe.engine.step.microbatch import MicroBatch
from autopipe.engine.step.stage_executor import StageRun
from autopipe.engine.transport.p2p import as_bytes
from autopipe.errors import AutopipeError, EngineError

Parts = list[tuple[int, list[Tensor]]]
"""For each micro-batch, its number of samples and its outputs."""


def gather_outputs(
    runs: Sequence[StageRun], microbatches: Sequence[MicroBatch], mesh: ProcessMesh, *, everywhere: bool
) -> list[Tensor] | None:
    """The graph's outputs over the whole batch, on the CPU. Collective.

    Args:
        everywhere: return them on all ranks; otherwise on those of the last stage, and None elsewhere.

    Raises:
        EngineError: an output cannot be put together; on every rank.
    """
    outputs: list[Tensor] | None = None
    error: AutopipeError | None = None
    last = next((run for run in runs if run.stage == mesh.num_stages - 1), None)
    if last is not None:
        parts = _of_all_replicas(_parts(last, microbatches), mesh)
        sizes = [size for size, _ in parts]
        try:
            outputs = [_merge([out[i] for _, out in parts], sizes) for i in range(len(parts[0][1]))]
        except EngineError as caught:
            error = caught
    if mesh.num_ranks > 1:
        outputs, error = _share(outputs, error, mesh, everywhere)
    if error is not None:
        raise error
    return outputs


def _parts(run: StageRun, microbatches: Sequence[MicroBatch]) -> Parts:
    return [
        (microbatch.num_samples, [run.results[m][i].detach().cpu() for i in sorted(run.results[m])])
        for m, microbatch in enumerate(microbatches)
    ]


def _of_all_replicas(mine: Parts, mesh: ProcessMesh) -> Parts:
    if mesh.data_parallel == 1:
        return mine
    gathered: list[Any] = [None] * mesh.data_parallel
    dist.all_gather_object(gathered, (mesh.replica, mine), group=mesh.data_control)
    return [part for _, parts in sorted(gathered, key=lambda g: g[0]) for part in parts]


def _share(
    outputs: list[Tensor] | None, error: AutopipeError | None, mesh: ProcessMesh, everywhere: bool
) -> tuple[list[Tensor] | None, AutopipeError | None]:
    """Send the error, if there is one, and the outputs, if wanted, from the last stage to the replica's other ranks."""
    group, source = mesh.pipeline_control, mesh.rank_of(mesh.num_stages - 1)
    header: list[Any] = [error, None if outputs is None else [(o.shape, o.dtype) for o in outputs]]
    dist.broadcast_object_list(header, source, group=group)
    if header[0] is not None or not everywhere:
        return outputs, header[0]
    if outputs is None:
        shared = [torch.empty(shape, dtype=dtype) for shape, dtype in header[1]]
    else:
        shared = [o.contiguous() for o in outputs]
    for tensor in shared:
        if tensor.numel():
            dist.broadcast(as_bytes(tensor), source, group=group)
    return shared, None


def _merge(parts: list[Tensor], sizes: list[int]) -> Tensor:
    """Put one output of all micro-batches together."""
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
