"""`autopipe.pipeline` makes an engine from a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autopipe.capture.loss import LossFunction
from autopipe.config import Auto, PipelineConfig
from autopipe.engine.engine import Engine
from autopipe.engine.ranks.context import make_context
from autopipe.errors import ConfigError
from autopipe.partition import Constraints
from autopipe.plan import Plan


def pipeline(
    model: nn.Module,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    example_target: Any = None,
    loss_fn: LossFunction | None = None,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    num_stages: int | Auto = "auto",
    num_microbatches: int | Auto = "auto",
    schedule: str = "auto",
    data_parallel: int | Auto = "auto",
    zero_stage: int | Auto = "auto",
    shard_batch: bool = True,
    precision: str = "fp32",
    max_grad_norm: float | None = None,
    loss_weight: Callable[[Any], float | Tensor] | None = None,
    accumulate_batches: int = 1,
    predict_on: Literal["all", "last"] = "all",
    compile: bool = False,
    self_check: bool = True,
    recompute: str = "auto",
    memory_limit: int | None = None,
    split_points: Sequence[str] | None = None,
    constraints: Constraints | None = None,
    plan: Plan | str | Path | None = None,
    weights: Mapping[str, Tensor] | str | Path | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> Engine:
    """Make an engine that trains `model` as a pipeline over the processes of the launch.

    `autopipe.pipeline(model)` alone is enough: the model is captured and planned at the first batch. Every rank makes
    the same call. Outside of torchrun it runs on one process with one stage.

    Args:
        model: any module, with the same parameters on every rank; its own `Parameter` objects are trained, and each
            rank keeps those of its stages alone. On the meta device each rank makes these alone: from `weights`, or by
            the model's own code.
        example_args, example_kwargs, example_target: a whole batch, as `train_batch` takes it; with it the model is
            planned at once, so that `engine.parameters()` and `engine.plan` are there before the first step.

    The other arguments are the fields of `autopipe.PipelineConfig`.

    Raises:
        ConfigError: an argument has a wrong value.
        CaptureError, ProfileError, PartitionError, PlanError: with an example, what planning may raise; on every rank.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"a model of type {type(model).__name__}",
            expected="a torch.nn.Module",
            where="model",
            remedy="pass the module itself",
        )
    context = make_context(device)
    config = PipelineConfig(
        loss_fn=loss_fn,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        schedule=schedule,
        data_parallel=data_parallel,
        zero_stage=zero_stage,
        shard_batch=shard_batch,
        precision=precision,
        max_grad_norm=max_grad_norm,
        loss_weight=loss_weight,
        accumulate_batches=accumulate_batches,
        predict_on=predict_on,
        compile=compile,
        self_check=self_check,
        recompute=recompute,
        memory_limit=memory_limit,
        split_points=split_points,
        constraints=constraints,
        plan=Plan.load(plan) if isinstance(plan, (str, Path)) else plan,
        weights=weights,
        device=context.device,
        seed=seed,
    )
    with context.monitor.call():
        engine = Engine(model, config, context)
        if example_args or example_kwargs:
            engine.prepare(example_args, example_kwargs or {}, example_target)
    return engine
