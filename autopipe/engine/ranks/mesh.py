"""Which rank runs what: replicas of the pipeline, and the stages of each rank within a replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from autopipe.engine.ranks.context import Context


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How many stages and replicas the ranks of a launch run, and which rank runs which.

    Attributes:
        num_stages: K.
        data_parallel: D, the number of replicas.
        ranks: (D x P) the rank that runs each pipeline rank of each replica, replica by replica; stage s is on pipeline rank s
            mod P.
    """

    num_stages: int
    data_parallel: int
    ranks: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        """P, the ranks of one replica."""
        return len(self.ranks) // self.data_parallel

    @property
    def replicas(self) -> tuple[tuple[int, ...], ...]:
        """For each replica, the ranks that run it, in the order of its pipeline."""
        P = self.num_ranks
        return tuple(self.ranks[d * P : (d + 1) * P] for d in range(self.data_parallel))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A shape as one rank sees it: a (data, pipeline) mesh, this rank's place in it, and its process groups.

    Attributes:
        shape: the mesh.
        rank: this rank in the world.
        replica, pipeline_rank: its place: row and column.
        data_group: the ranks that hold the same stages in all replicas, on the device's backend; None with one replica.
        data_control, pipeline_control: gloo groups for small messages, over these ranks and over those of this replica; None
            where there is only one such rank. In a group ranks stand in ascending order, whatever the mesh says.
    """

    shape: Shape
    rank: int
    replica: int
    pipeline_rank: int
    data_group: Any = None
    data_control: Any = None
    pipeline_control: Any = None

    @property
    def num_stages(self) -> int:
        """K, at least P."""
        return self.shape.num_stages

    @property
    def num_ranks(self) -> int:
        """P, the ranks of one replica."""
        return self.shape.num_ranks

    @property
    def data_parallel(self) -> int:
        """D, the number of replicas."""
        return self.shape.data_parallel

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages of this rank, ascending."""
        return tuple(range(self.pipeline_rank, self.num_stages, self.num_ranks))

    def rank_of(self, stage: int, replica: int | None = None) -> int:
        """The rank in the world that runs a stage, of this replica or of another."""
        P = self.num_ranks
        return self.shape.ranks[(self.replica if replica is None else replica) * P + stage % P]

    def flow(self, source: int, target: int) -> tuple[int, int] | None:
        """The ranks that run two stages of this replica; None where that is one rank."""
        ends = self.rank_of(source), self.rank_of(target)
        return None if ends[0] == ends[1] else ends

    def is_mine(self, stage: int) -> bool:
        """Whether this rank runs the stage."""
        return stage % self.num_ranks == self.pipeline_rank


def make_layout(context: Context, shape: Shape) -> Layout:
    """The layout of a run, and its process groups. Collective."""
    groups: dict[str, Any] = {}
    if shape.data_parallel > 1:
        mesh = DeviceMesh(context.device.type, torch.tensor(shape.replicas), mesh_dim_names=("data", "pipeline"))
        groups["data_group"] = mesh.get_group("data")
        context.keep(groups["data_group"])
        groups["data_control"] = _own_group(list(zip(*shape.replicas, strict=True)), context)
        groups["pipeline_control"] = _own_group(shape.replicas, context)
    else:
        groups["pipeline_control"] = context.control
    replica, pipeline_rank = divmod(shape.ranks.index(context.rank), shape.num_ranks)
    return Layout(shape=shape, rank=context.rank, replica=replica, pipeline_rank=pipeline_rank, **groups)


def _own_group(rank_sets: Sequence[Sequence[int]], context: Context) -> Any:
    """Makes a gloo group for each set of ranks, on every rank in the same order; gives this rank's."""
    own = None
    for ranks in rank_sets:
        group = context.new_group(ranks, backend="gloo")
        if context.rank in ranks and len(ranks) > 1:
            own = group
    return own
