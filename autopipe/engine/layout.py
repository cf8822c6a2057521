"""Which rank runs what: replicas of the pipeline, and the stages of each rank within a replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import init_device_mesh

from autopipe.engine.context import Context


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The ranks as a (data, pipeline) mesh: rank r is pipeline rank r mod P of replica r div P. Stage s runs on pipeline rank s mod P.

    Attributes:
        num_stages: K, at least P.
        num_ranks: P, the ranks of one replica.
        data_parallel: D, the number of replicas.
        rank: this rank in the world.
        data_group: the ranks that hold the same stages in all replicas, on the device's backend; None with one replica.
        data_control, pipeline_control: gloo groups for small messages, over these ranks and over those of this replica; None
            where there is only one such rank.
    """

    num_stages: int
    num_ranks: int
    data_parallel: int
    rank: int
    data_group: Any = None
    data_control: Any = None
    pipeline_control: Any = None

    @property
    def replica(self) -> int:
        """The replica of this rank."""
        return self.rank // self.num_ranks

    @property
    def pipeline_rank(self) -> int:
        """This rank's place in its replica."""
        return self.rank % self.num_ranks

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages of this rank, ascending."""
        return tuple(range(self.pipeline_rank, self.num_stages, self.num_ranks))

    def rank_of(self, stage: int, replica: int | None = None) -> int:
        """The rank in the world that runs a stage, of this replica or of another."""
        return (self.replica if replica is None else replica) * self.num_ranks + stage % self.num_ranks

    def is_mine(self, stage: int) -> bool:
        """Whether this rank runs the stage."""
        return stage % self.num_ranks == self.pipeline_rank


def make_layout(context: Context, num_stages: int, data_parallel: int) -> Layout:
    """The layout of a run, and its process groups. Collective."""
    num_ranks = context.world_size // data_parallel
    groups: dict[str, Any] = {}
    if data_parallel > 1:
        mesh = init_device_mesh(context.device.type, (data_parallel, num_ranks), mesh_dim_names=("data", "pipeline"))
        groups["data_group"] = mesh.get_group("data")
        context.keep(groups["data_group"])
        same_stage = [list(range(p, context.world_size, num_ranks)) for p in range(num_ranks)]
        same_replica = [list(range(d * num_ranks, (d + 1) * num_ranks)) for d in range(data_parallel)]
        groups["data_control"] = _own_group(same_stage, context)
        groups["pipeline_control"] = _own_group(same_replica, context)
    else:
        groups["pipeline_control"] = context.control
    return Layout(num_stages=num_stages, num_ranks=num_ranks, data_parallel=data_parallel, rank=context.rank, **groups)


def _own_group(rank_sets: Sequence[Sequence[int]], context: Context) -> Any:
    """Makes a gloo group for each set of ranks, on every rank in the same order; gives this rank's."""
    own = None
    for ranks in rank_sets:
        group = context.new_group(ranks, backend="gloo")
        if context.rank in ranks and len(ranks) > 1:
            own = group
    return own
