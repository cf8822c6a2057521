"""This replica's share of a call, weighted so that the losses of all replicas add up to the whole batch's mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autopipe.config import PipelineConfig
from autopipe.engine.step.microbatch import MicroBatch, normalised, raw_weights
from autopipe.engine.transport.peers import Peers


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShard:
    """This replica's share of a call.

    Attributes:
        microbatches, weights: its micro-batches, and their shares in the mean loss of the whole batch.
        first: the place of the first of them among all replicas' micro-batches.
        total: the weight of the whole batch: its samples, or what `loss_weight` says.
        given: the micro-batches of all that this rank was given: of the whole batch, or of its replica's own.
    """

    microbatches: Sequence[MicroBatch]
    weights: Sequence[float]
    first: int
    total: float
    given: Sequence[MicroBatch]


def shard_batch_of(
    microbatches: list[MicroBatch],
    config: PipelineConfig,
    peers: Peers,
    *,
    most: int,
    weighted: bool = True,
) -> BatchShard:
    """Return the share of this rank's replica. Collective if every replica has a batch of its own.

    Args:
        microbatches: of the whole batch, or of the replica's own.
        most: micro-batches that a replica can have.
        weighted: false if no loss is made, so that `loss_weight` has nothing to count.

    Raises:
        ConfigError: `loss_weight` returned something that is not a weight.
    """
    mesh = peers.mesh
    raw = raw_weights(microbatches, config.loss_weight if weighted else None)
    if not config.shard_batch:
        sums = torch.tensor(sum(raw), dtype=torch.float64)
        if mesh.data_parallel > 1:
            peers.transport.all_reduce(sums)
            sums /= mesh.num_ranks
        total, first = float(sums), mesh.replica * most
        weights = normalised(raw, total)
        return BatchShard(microbatches=microbatches, weights=weights, first=first, total=total, given=microbatches)
    shares, count = normalised(raw, sum(raw)), len(microbatches)
    begin, end = (count * (mesh.replica + i) // mesh.data_parallel for i in (0, 1))
    mine, weights = microbatches[begin:end], shares[begin:end]
    return BatchShard(microbatches=mine, weights=weights, first=begin, total=sum(raw), given=microbatches)
