"""The peers: each is made from the same layers, cut into the same stages, and gives a function that does one training
step."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Step = Callable[[], float | None]
"""Runs a step with its optimizer; the mean loss where this rank knows it."""
Sgd = partial(torch.optim.SGD, lr=1e-3)


def autopipe_step(
    layers: list[nn.Module], batch: Tensor, target: Tensor, loss_fn: Any, num_microbatches: int, **settings: Any
) -> Step:
    """autopipe, cut before every `len(layers) / num_stages`-th layer."""
    import autopipe

    num_stages = settings.pop("num_stages", dist.get_world_size())
    each = len(layers) // num_stages
    engine = autopipe.pipeline(
        nn.Sequential(*copy.deepcopy(layers)),
        loss_fn=loss_fn,
        optimizer=Sgd,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        split_points=[str(each * s) for s in range(1, num_stages)] if num_stages > 1 else None,
        self_check=False,
        device="cpu",
        **{"schedule": "1f1b", **settings},
    )

    def step() -> float:
        return float(engine.train_batch(batch, target=target))

    step.engine = engine  # type: ignore[attr-defined]
    return step


def torch_step(layers: list[nn.Module], batch: Tensor, target: Tensor, loss_fn: Any, num_microbatches: int) -> Step:
    """`torch.distributed.pipelining.Schedule1F1B` over hand-made stages."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank, num_stages = dist.get_rank(), dist.get_world_size()
    each = len(layers) // num_stages
    module = nn.Sequential(*copy.deepcopy(layers[each * rank : each * (rank + 1)]))
    stage = PipelineStage(module, rank, num_stages, torch.device("cpu"))
    schedule = Schedule1F1B(stage, num_microbatches, loss_fn=loss_fn)
    optimizer = Sgd(module.parameters())

    def step() -> float | None:
        optimizer.zero_grad()
        losses: list[Tensor] = []
        last = rank == num_stages - 1
        schedule.step(*([batch] if rank == 0 else []), **({"target": target, "losses": losses} if last else {}))
        optimizer.step()
        return float(torch.stack(losses).mean()) if last else None

    return step


def deepspeed_step(layers: list[nn.Module], batch: Tensor, target: Tensor, loss_fn: Any, num_microbatches: int) -> Step:
    """DeepSpeed's PipelineEngine, ZeRO-0, fp32, without activation checkpointing."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        from deepspeed.pipe import PipelineModule

        logging.disable(logging.WARNING)
        deepspeed.init_distributed(dist_backend="gloo")
        net = PipelineModule(
            layers=copy.deepcopy(layers),
            num_stages=dist.get_world_size(),
            loss_fn=loss_fn,
            partition_method="uniform",
            activation_checkpoint_interval=0,
        )
        size = batch.shape[0] // num_microbatches
        config = {
            "train_batch_size": batch.shape[0],
            "train_micro_batch_size_per_gpu": size,
            "gradient_accumulation_steps": num_microbatches,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
        }
        parameters = list(net.parameters())
        engine, *_ = deepspeed.initialize(
            model=net, config=config, optimizer=Sgd(parameters), model_parameters=parameters
        )

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from zip(batch.chunk(num_microbatches), target.chunk(num_microbatches), strict=True)

    data = pieces()
    return lambda: float(engine.train_batch(data))


PEERS: dict[str, Callable[..., Step]] = {
    "autopipe": autopipe_step,
    "eager": partial(autopipe_step, schedule="eager-1f1b"),
    "auto": partial(autopipe_step, schedule="auto"),
    "torch": torch_step,
    "deepspeed": deepspeed_step,
}
