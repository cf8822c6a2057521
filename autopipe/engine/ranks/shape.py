"""The settings and the number of processes go in; how many stages and replicas they make comes out, or that the planner is to choose."""

from __future__ import annotations

from autopipe.config import PipelineConfig
from autopipe.engine.ranks.mesh import Shape
from autopipe.errors import ConfigError, PlanError
from autopipe.plan import Plan


def shape_of(config: PipelineConfig, world_size: int) -> Shape:
    """The number of stages and of replicas for the processes of the launch.

    Raises:
        ConfigError: the processes cannot be divided so.
        PlanError: the plan is for another number of processes.
    """
    if config.plan is not None:
        return shape_of_plan(config.plan, config, world_size)
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
    if num_stages % num_ranks or (num_stages > num_ranks and config.schedule not in ("auto", "interleaved")):
        several = "" if num_stages % num_ranks else ", or schedule='interleaved' to put several stages on each"
        raise _cannot_divide(
            f"num_stages = {num_stages} with {num_ranks} process{'es' if num_ranks > 1 else ''} a replica",
            f"launch with `torchrun --nproc-per-node {num_stages * replicas}`, or leave num_stages at 'auto'{several}",
        )
    return Shape(num_stages=num_stages, data_parallel=replicas, ranks=tuple(range(world_size)))


def shape_of_plan(plan: Plan, config: PipelineConfig, world_size: int) -> Shape:
    """The shape that a plan says. One that names no ranks runs in as many replicas as there are processes for.

    Raises:
        PlanError: the processes are not those of the plan, or a setting beside it says something else.
    """
    P = plan.num_ranks or plan.num_stages
    D = plan.data_parallel if plan.ranks else max(world_size // P, 1)
    if world_size != D * P:
        each = f"{P} process{'es' if P > 1 else ''} for each replica"
        raise PlanError(
            f"{world_size} process{'es' if world_size > 1 else ''} for a plan of {plan.num_stages} stages, {plan.data_parallel} replicas",
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
    return Shape(num_stages=plan.num_stages, data_parallel=D, ranks=plan.ranks or tuple(range(world_size)))


def _cannot_divide(got: str, remedy: str) -> ConfigError:
    return ConfigError(
        got, expected="a process for each stage of each replica", where="autopipe.pipeline()", remedy=remedy
    )
