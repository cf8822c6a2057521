"""Searches for the best way to use the processes of the launch, given the first batch; the same plan on every rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial

import profiler
from autopipe.capture import Captured
from autopipe.cluster import Cluster, Device
from autopipe.config import PipelineConfig
from autopipe.engine.ranks.context import Context
from autopipe.engine.setup.planning import memory_limit, optimizer_states, profiled, zero_stages
from autopipe.engine.step.microbatch import Batch, MicroBatch, batch_size, split
from autopipe.partition import Constraints
from autopipe.partition.cluster.strategy_search import SearchSpace, search
from autopipe.plan import Plan
from autopipe.schedule.kinds import TRIED, undivided
from profiler.records import LinkProfile, Profile
from profiler.sizes import check_sizes, sizes_to_profile

SEARCH_BUDGET_S = 4.0
_LOG = logging.getLogger("autopipe.engine")


def left_to_search(config: PipelineConfig, world_size: int) -> bool:
    """Return whether the planner chooses how to use the processes: stages are open, and replicas or micro-batches.

    A plan or split points fix it. If each replica brings a batch of its own, the caller has chosen the replicas.
    """
    several = config.num_stages == "auto" and "auto" in (config.data_parallel, config.num_microbatches)
    given = config.plan is not None or config.split_points is not None or not config.shard_batch
    return world_size > 1 and several and not given


def search_plan(
    batch: Batch,
    config: PipelineConfig,
    context: Context,
    capture: Callable[[MicroBatch], Captured],
) -> tuple[Captured, MicroBatch, Plan]:
    """Capture and measure the model at two micro-batch sizes, and search. Collective.

    Args:
        batch: the first batch: args, kwargs and target.
        capture: captures the training graph.

    Returns:
        The graph that was planned, the micro-batch that it was captured with, and the plan.

    Raises:
        CaptureError, ProfileError, PartitionError: as planning a given number of stages.
    """
    context.require_equal(split(*batch, 1)[0].signature, "a first batch", "give every rank the same batch")
    cluster = _cluster(config, context)
    size, with_target = batch_size(*batch), config.loss_fn is not None
    seen: list[tuple[Captured, MicroBatch, Profile]] = []
    for wanted in sizes_to_profile(size, context.world_size):
        microbatch = split(*batch, size // wanted)[-1]
        captured = context.agree(partial(capture, microbatch))
        seen.append((captured, microbatch, profiled(captured, microbatch.tensors(with_target), context, config)))
    if len({tuple(n.name for n in captured.nodes) for captured, _, _ in seen}) > 1:
        _LOG.info(
            "the graph depends on the size of a micro-batch: times of other sizes than the largest are in proportion"
        )
        seen = seen[-1:]
    profiles = check_sizes([profile for _, _, profile in seen])
    plan = context.once(
        lambda: search(
            profiles, cluster, _search_space(config, size, context.world_size), time_budget_s=SEARCH_BUDGET_S
        )
    )
    captured, microbatch, _ = seen[0]
    return captured, microbatch, plan


def _search_space(config: PipelineConfig, size: int, world_size: int) -> SearchSpace:
    """The space that the settings leave open."""
    data_parallel = None if config.data_parallel == "auto" else config.data_parallel
    num_microbatches = None if config.num_microbatches == "auto" else config.num_microbatches
    may_shard = zero_stages(config, world_size)
    schedules: tuple[str, ...] = (config.schedule,)
    if config.schedule == "auto":  # a compiled stage is one autograd node, whose backward has no parts
        schedules = undivided(TRIED) if config.compile else TRIED
    return SearchSpace(
        global_batch=_divisible(size, world_size, data_parallel or 1, num_microbatches or 1),
        data_parallel=data_parallel,
        num_microbatches=num_microbatches,
        zero_stage=None if len(may_shard) > 1 else may_shard[0],
        schedules=schedules,
        optimizer=optimizer_states(config),
        recompute=config.recompute,
        constraints=config.constraints or Constraints(),
    )


def _divisible(size: int, world_size: int, data_parallel: int, num_microbatches: int) -> int:
    """The batch size that is planned: the search divides evenly and the engine need not, so a remainder is left out."""
    least = data_parallel * num_microbatches
    for unit in (world_size * num_microbatches, least):
        if size >= unit:
            return size - size % unit
    return least


def _cluster(config: PipelineConfig, context: Context) -> Cluster:
    """The devices of the launch, host by host in the launcher's order, and the measured links. Collective."""
    told = context.gather((context.num_local, memory_limit(config, context) or _share_of_the_host(context)))
    nodes: list[tuple[Device, ...]] = []
    while (begin := sum(map(len, nodes))) < len(told):
        members = told[begin : begin + told[begin][0]]
        nodes.append(tuple(Device(memory_bytes=limit) for _, limit in members))
    within = context.agree(lambda: profiler.measure_link(device=context.device))
    between = _link_between(0, len(nodes[0]), context) if len(nodes) > 1 else within
    return Cluster(nodes=tuple(nodes), within=within, between=between)


def _link_between(first: int, second: int, context: Context) -> LinkProfile:
    """The link between two ranks, measured by them. Collective."""
    group = context.new_group([first, second])

    def measured() -> LinkProfile | None:
        return profiler.measure_link(group, device=context.device) if context.rank in (first, second) else None

    link = context.gather(context.agree(measured))[first]
    assert link is not None
    return link


def _share_of_the_host(context: Context) -> int:
    """On a CPU, a process's share of its host's memory; with no limit every replica could be as large as the model."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // context.num_local
