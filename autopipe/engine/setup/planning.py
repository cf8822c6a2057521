"""Plans a model by its first batch: every rank captures, rank 0 measures and cuts, and all compare what they have."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

import profiler
from autopipe.capture import Captured
from autopipe.config import PipelineConfig
from autopipe.engine.ranks.context import Context
from autopipe.engine.ranks.mesh import ProcessMesh
from autopipe.engine.step.microbatch import MicroBatch, check_device
from autopipe.engine.step.precision import precision_context
from autopipe.engine.step.programs import capture_output, capture_program, mode_of
from autopipe.engine.transport.shm_setup import close_channels, open_channels, transport_over
from autopipe.errors import PartitionError
from autopipe.partition import partition
from autopipe.plan import Plan
from autopipe.schedule.kinds import DEFAULT, PLANNED, undivided
from autopipe.simulate import fastest_schedule, rescheduled, schedules_for
from profiler import accelerator
from profiler.records import LinkProfile, Profile

MASTER_STATES = 7.0
"""Extra bytes per byte of a bf16 parameter and gradient: 2 for the master copy, 4 for Adam, 1 for the fp32 gradient."""


def num_microbatches_of(config: PipelineConfig, num_stages: int) -> int:
    """The number of micro-batches of a batch that has samples enough."""
    if config.num_microbatches != "auto":
        return config.num_microbatches
    if config.plan is not None:
        return config.plan.num_microbatches
    return 1 if num_stages == 1 else 4 * num_stages


def capture_first(
    model: nn.Module,
    microbatch: MicroBatch,
    config: PipelineConfig,
    context: Context,
    flags: Mapping[nn.Module, bool],
    *,
    for_output: bool,
) -> Captured:
    """Capture the graph that is planned: the training graph, or with `for_output` the one up to the output."""
    check_device(microbatch, context.device)
    with mode_of(model, True, flags):
        check = config.self_check and context.rank == 0
        modes = precision_context(config, context.device)
        if for_output:
            return capture_output(model, microbatch, check=check, modes=modes)
        return capture_program(model, microbatch, "train", config.loss_fn, check=check, modes=modes)


def plan_layout(
    microbatch: MicroBatch,
    config: PipelineConfig,
    context: Context,
    mesh: ProcessMesh,
    num_microbatches: int,
    capture: Callable[[MicroBatch], Captured],
) -> tuple[Captured, MicroBatch, Plan]:
    """Return the graph of a first micro-batch, that micro-batch, and its plan for a given mesh. Collective."""
    if not config.shard_batch and mesh.data_parallel > 1:
        # replicas may begin with different shapes: rank 0's are planned
        check_device(microbatch, context.device)
        first = context.gather(microbatch.template())[0]
        microbatch = microbatch if context.rank == 0 else first
    captured = context.agree(lambda: capture(microbatch))
    plan = context.agree(lambda: make_plan(captured, microbatch, config, context, mesh, num_microbatches))
    return captured, microbatch, plan


def make_plan(
    captured: Captured,
    microbatch: MicroBatch,
    config: PipelineConfig,
    context: Context,
    mesh: ProcessMesh,
    num_microbatches: int,
) -> Plan:
    """The plan of a captured training graph: the user's, or one made on rank 0 and sent to all. Collective."""
    num_stages = mesh.num_stages
    if config.plan is not None:
        zero_stage = config.plan.zero_stage if config.zero_stage == "auto" else config.zero_stage
        return dataclasses.replace(config.plan, data_parallel=mesh.data_parallel, zero_stage=zero_stage)
    if len(captured.nodes) < num_stages:
        raise PartitionError(
            f"{num_stages} stages for a graph of {len(captured.nodes)} nodes",
            expected="at most one stage for each node",
            where="num_stages",
            remedy=f"launch at most {len(captured.nodes)} processes",
        )
    link = measured_link(context) if mesh.num_ranks > 1 else None
    profile = profiled(captured, microbatch.tensors(config.loss_fn is not None), context, config)

    def cut(zero_stage: int) -> Plan:
        return partition(
            profile,
            num_stages=num_stages,
            num_microbatches=num_microbatches,
            link=link,
            recompute=config.recompute,
            optimizer=optimizer_states(config),
            memory_limit=memory_limit(config, context),
            data_parallel=mesh.data_parallel,
            zero_stage=zero_stage,
            schedule=config.schedule if config.schedule in PLANNED else DEFAULT,
            split_points=list(config.split_points) if config.split_points is not None else None,
            constraints=config.constraints,
        )

    plan = context.once(lambda: _without_recompute(cut, zero_stages(config, mesh.data_parallel)))
    if config.schedule != "auto":
        return rescheduled(plan, config.schedule, num_ranks=mesh.num_ranks)
    names = schedules_for(num_stages, mesh.num_ranks)
    if config.compile or any(s.recompute for s in plan.stages):  # compiled stages are one autograd node
        names = undivided(names)
    return fastest_schedule(plan, num_ranks=mesh.num_ranks, schedules=names)


def optimizer_states(config: PipelineConfig) -> str | float:
    """The optimizer states that a run keeps, as the planner counts them."""
    return MASTER_STATES if config.precision == "bf16-params" else "adam"


def zero_stages(config: PipelineConfig, data_parallel: int) -> tuple[int, ...]:
    """The ZeRO stages that a run may take, the cheapest first."""
    if config.zero_stage != "auto":
        return (config.zero_stage,)
    return (0, 1) if data_parallel > 1 and config.optimizer is not None else (0,)


def _without_recompute(cut: Callable[[int], Plan], zero_stages: Sequence[int]) -> Plan:
    """The plan under the first ZeRO stage that fits without recompute; if none does, the fastest that fits with it."""
    found: list[Plan] = []
    failure: PartitionError | None = None
    for zero_stage in zero_stages:
        try:
            found.append(cut(zero_stage))
        except PartitionError as caught:
            failure = failure or caught
            continue
        if not any(stage.recompute for stage in found[-1].stages):
            return found[-1]
    if failure is not None and not found:
        raise failure
    return min(found, key=lambda plan: plan.step_us)


def profiled(captured: Captured, tensors: Sequence[Tensor], context: Context, config: PipelineConfig) -> Profile:
    """Profile a captured graph on the tensors of a micro-batch, under the run's precision, on rank 0. Collective.

    On a CPU the ranks share caches and memory: all measure at once, so that the machine is as busy as in training.
    """
    together = context.device.type == "cpu"

    def measured() -> Profile:
        with precision_context(config, context.device)():
            return profiler.profile(
                captured.graph_module,
                [t.to(context.device) for t in tensors],
                device=context.device,
                progress=context.rank == 0,
                names=dict(captured.names),
                graph_hash=captured.graph_hash,
                num_together=context.num_local if together else 1,
            )

    return context.gather(context.agree(measured))[0] if together else context.once(measured)


def measured_link(context: Context) -> LinkProfile:
    """The link between the first two ranks, over which the engine would send. Collective."""
    channels = open_channels([(0, 1), (1, 0)], context) if context.device.type == "cpu" else {}
    try:
        return context.agree(lambda: profiler.measure_link(device=context.device, way=transport_over(channels)))
    finally:
        close_channels(channels)


def memory_limit(config: PipelineConfig, context: Context) -> int | None:
    """The bytes that a stage may hold."""
    if config.memory_limit is not None or not accelerator.is_accelerator(context.device):
        return config.memory_limit
    return accelerator.memory_bytes(context.device)


def compare_ranks(context: Context, captured: Captured, plan: Plan) -> None:
    """Raise on every rank if the ranks differ in graph, plan, or versions: an error instead of a hang."""
    context.require_equal(
        f"torch {torch.__version__}, Python {platform.python_version()}",
        "versions",
        "install the same versions on all ranks",
    )
    context.require_equal(
        captured.graph_hash,
        "graph",
        "run the same model code with the same configuration and batch shapes on all ranks",
    )
    context.require_equal(plan.plan_hash, "plan", "give all ranks the same plan")
