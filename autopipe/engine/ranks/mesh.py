"""The process mesh: replicas of the pipeline, and the stages of each rank within a replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from autopipe.config import PipelineConfig
from autopipe.engine.ranks.context import Context
from autopipe.errors import ConfigError, PlanError
from autopipe.plan import Plan
from autopipe.schedule.kinds import SEVERAL_STAGES_A_RANK, dealt_over_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshShape:
    """Numbers of stages and replicas of a launch, and the rank that runs each.

    Attributes:
        num_stages: K.
        data_parallel: D, the number of replicas.
        ranks: (D x P) the rank that runs each pipeline rank of each replica, replica by replica; stage s is on pipeline
            rank s mod P.
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
class ProcessMesh:
    """A shape as one rank sees it: a (data, pipeline) mesh, this rank's place in it, and its process groups.

    Attributes:
        shape: the mesh.
        rank: this rank in the world.
        replica, pipeline_rank: its place: row and column.
        data_group: the ranks that hold the same stages in all replicas, on the device's backend; None with one replica.
        data_control, pipeline_control: gloo groups for small messages, over these ranks and over those of this replica;
            None where there is only one such rank. In a group ranks stand in ascending order, whatever the mesh says.
    """

    shape: MeshShape
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


def make_mesh(context: Context, shape: MeshShape) -> ProcessMesh:
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
    return ProcessMesh(shape=shape, rank=context.rank, replica=replica, pipeline_rank=pipeline_rank, **groups)


def _own_group(rank_sets: Sequence[Sequence[int]], context: Context) -> Any:
    """Makes a gloo group for each set of ranks, on every rank in the same order; gives this rank's."""
    own = None
    for ranks in rank_sets:
        group = context.new_group(ranks, backend="gloo")
        if context.rank in ranks and len(ranks) > 1:
            own = group
    return own


def mesh_shape(config: PipelineConfig, world_size: int) -> MeshShape:
    """The number of stages and of replicas for the processes of the launch.

    Raises:
        ConfigError: the processes cannot be divided so.
        PlanError: the plan is for another number of processes.
    """
    if config.plan is not None:
        return mesh_shape_of_plan(config.plan, config, world_size)
    replicas = config.data_parallel
    if replicas == "auto":
        wanted = config.num_stages
        fits = wanted != "auto" and wanted < world_size and world_size % wanted == 0
        replicas = world_size // wanted if fits and wanted != "auto" else 1
    if world_size % replicas:
        raise _cannot_divide(
            f"{world_size} processes for {replicas} replicas", f"launch a multiple of {replicas} processes"
        )
    num_ranks = world_size // replicas
    num_stages = num_ranks if config.num_stages == "auto" else config.num_stages
    if num_stages % num_ranks or (num_stages > num_ranks and config.schedule not in ("auto", *SEVERAL_STAGES_A_RANK)):
        several = (
            "" if num_stages % num_ranks else f", or schedule={dealt_over_ranks()!r} to put several stages on each"
        )
        raise _cannot_divide(
            f"num_stages = {num_stages} with {num_ranks} process{'es' if num_ranks > 1 else ''} a replica",
            f"launch with `torchrun --nproc-per-node {num_stages * replicas}`, or leave num_stages at 'auto'{several}",
        )
    return MeshShape(num_stages=num_stages, data_parallel=replicas, ranks=tuple(range(world_size)))


def mesh_shape_of_plan(plan: Plan, config: PipelineConfig, world_size: int) -> MeshShape:
    """The shape that a plan says. One that names no ranks runs in as many replicas as there are processes for.

    Raises:
        PlanError: the processes are not those of the plan, or a setting beside it says something else.
    """
    P = plan.num_ranks or plan.num_stages
    D = plan.data_parallel if plan.ranks else max(world_size // P, 1)
    if world_size != D * P:
        each = f"{P} process{'es' if P > 1 else ''} for each replica"
        raise PlanError(
            f"{world_size} process{'es' if world_size > 1 else ''} for a plan of {plan.num_stages} stages, "
            f"{plan.data_parallel} replicas",
            expected=f"{D * P} processes, whose ranks the plan names" if plan.ranks else each,
            where="plan",
            remedy=f"launch with `torchrun --nproc-per-node {P * plan.data_parallel}`, "
            "or plan again for the processes that there are",
        )
    for name, planned in (("num_stages", plan.num_stages), ("data_parallel", D)):
        if getattr(config, name) not in ("auto", planned):
            raise PlanError(
                f"{name} = {getattr(config, name)} beside a plan of {planned}",
                expected="what the plan says",
                where=f"plan and {name}",
                remedy=f"leave {name} out, or plan again with it",
            )
    if plan.zero_stage and config.zero_stage == "auto" and config.optimizer is None:
        raise PlanError(
            f"a plan of ZeRO-{plan.zero_stage} without an optimizer",
            expected="an optimizer whose state can be sharded",
            where="plan and optimizer",
            remedy="pass optimizer=, or zero_stage=0 to keep the whole state in every replica",
        )
    return MeshShape(num_stages=plan.num_stages, data_parallel=D, ranks=plan.ranks or tuple(range(world_size)))


def _cannot_divide(got: str, remedy: str) -> ConfigError:
    return ConfigError(
        got, expected="a process for each stage of each replica", where="autopipe.pipeline()", remedy=remedy
    )
