"""From the first batch to a plan that all ranks share: rank 0 measures and cuts, every rank captures, and all compare what they have."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import profiler
from autopipe.capture import Captured
from autopipe.config import PipelineConfig
from autopipe.engine.batch import MicroBatch
from autopipe.engine.context import Context
from autopipe.errors import ConfigError, PartitionError
from autopipe.partition import partition
from autopipe.plan import Plan


def num_stages_of(config: PipelineConfig, context: Context) -> int:
    """The number of stages: one for each process.

    Raises:
        ConfigError: another number was asked for.
    """
    wanted = config.plan.num_stages if config.plan is not None else config.num_stages
    if wanted == "auto" or wanted == context.world_size:
        return context.world_size
    raise ConfigError(
        f"num_stages = {wanted} with {context.world_size} process{'es' if context.world_size > 1 else ''}",
        expected="one process for each stage",
        where="autopipe.pipeline()",
        remedy=f"launch with `torchrun --nproc-per-node {wanted}`, or leave num_stages at 'auto'",
    )


def num_microbatches_of(config: PipelineConfig, num_stages: int) -> int:
    """The number of micro-batches of a batch that has samples enough."""
    if config.num_microbatches != "auto":
        return config.num_microbatches
    if config.plan is not None:
        return config.plan.num_microbatches
    return 1 if num_stages == 1 else 4 * num_stages


def make_plan(
    captured: Captured,
    microbatch: MicroBatch,
    config: PipelineConfig,
    context: Context,
    num_microbatches: int,
    model: nn.Module,
) -> Plan:
    """The plan of a captured training graph: the user's, or one measured and cut on rank 0 and sent to all."""
    num_stages = num_stages_of(config, context)
    if config.plan is not None:
        return config.plan
    if len(captured.nodes) < num_stages:
        raise PartitionError(
            f"{num_stages} stages for a graph of {len(captured.nodes)} nodes",
            expected="at most one stage for each node",
            where="num_stages",
            remedy=f"launch at most {len(captured.nodes)} processes",
        )

    def measure_and_cut() -> Plan:
        tensors = microbatch.tensors(config.loss_fn is not None)
        profile = profiler.profile(
            captured.graph_module,
            [t.to(context.device) for t in tensors],
            device=context.device,
            names=dict(captured.names),
            graph_hash=captured.graph_hash,
        )
        return partition(
            profile,
            num_stages=num_stages,
            num_microbatches=num_microbatches,
            memory_limit=memory_limit(config, context),
            schedule="1f1b" if config.schedule == "auto" else config.schedule,
            split_points=list(config.split_points) if config.split_points is not None else None,
        )

    return context.once(measure_and_cut)


def memory_limit(config: PipelineConfig, context: Context) -> int | None:
    """The bytes that a stage may hold."""
    if config.memory_limit is not None or context.device.type != "cuda":
        return config.memory_limit
    return int(torch.cuda.get_device_properties(context.device).total_memory)


def compare_ranks(context: Context, captured: Captured, plan: Plan) -> None:
    """Raises on every rank where the ranks differ in graph, plan, or versions: an error instead of a hang."""
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


def precision_context(config: PipelineConfig, device: torch.device) -> Callable[[], Any]:
    """Makes the context under which stages run."""
    if config.precision == "bf16":
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext
