"""Every setting of `autopipe.pipeline` in one validated record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from autopipe.capture.loss import LossFunction
from autopipe.errors import ConfigError
from autopipe.partition import Constraints
from autopipe.plan import RECOMPUTE, Plan
from autopipe.schedule.kinds import TRAINING

Auto = Literal["auto"]
PRECISIONS = ("fp32", "bf16", "bf16-params", "fp16")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """The settings of a pipeline. `"auto"` leaves the choice to autopipe.

    On several processes, if `num_stages` and one of `data_parallel` and `num_microbatches` are `auto`, the planner
    searches stages x replicas x micro-batches x schedule x recompute x ZeRO for the shortest step of the first batch on
    these processes that fits into their memory, and what is given of these stays as it is. Split points, a plan, or
    `shard_batch=False` leave no such choice.

    Attributes:
        loss_fn: `loss_fn(output, target) -> scalar`; None: the model returns its loss.
        optimizer: `params -> Optimizer`; a function whose first argument is called `named_parameters` gets (name,
            parameter) pairs of this rank, for parameter groups by name. None: the engine only leaves gradients.
        lr_scheduler: `optimizer -> LRScheduler`, stepped after each optimizer step.
        num_stages: number of stages; `auto`, if nothing is searched: one for each process of a replica. A multiple
            of it puts several on each process.
        num_microbatches: number of micro-batches in a replica's share of the batch; `auto`, if nothing is searched:
            four for each stage, as far as the batch has samples.
        schedule: `1f1b`, `eager-1f1b` (hides transfers, holds more activations), `gpipe`, `interleaved` (with several
            stages a process), or `zb-h1`; `auto`: interleaved with several stages a process, otherwise the fastest of
            the others by the simulator.
        data_parallel: replicas of the pipeline; `auto`, if nothing is searched: as many as the processes allow for
            `num_stages`, 1 if that is `auto`.
        zero_stage: 1 shards the optimizer state over the replicas; `auto`: if the memory limit demands it, or the
            plan says so.
        shard_batch: every rank passes the whole batch, and each replica takes its share; False: each replica passes a
            share of its own, as with `engine.sampler(dataset)`.
        precision: `fp32` (the parameters' own dtype), `bf16` (autocast), `bf16-params` (autocast, parameters rounded to
            bf16, fp32 master copies in the optimizer, fp32 gradients), or `fp16` (autocast, with loss scaling).
        accumulate_batches: calls of `train_batch` for one optimizer step, made with the mean of their gradients.
        predict_on: `predict` gives the output on `all` ranks, or on the `last` stage's alone and None elsewhere.
        compile: compile each stage with `torch.compile`.
        max_grad_norm: gradients are scaled down to this norm over all stages; None: not at all.
        loss_weight: weight of a micro-batch, from its target if one is given and from its keyword arguments
            otherwise; None: its number of samples.
        self_check: replay one micro-batch through model and graph and compare.
        recompute: `auto`: activations are computed again as far as the memory limit demands, the cheapest first;
            `none`: never; `full`: every stage as a whole.
        memory_limit: bytes that a stage may hold; None: the device's memory on CUDA; on a CPU no limit, and in a search
            the process's share of the host's memory.
        split_points: FQNs of submodules at which a new stage begins, instead of the planner's cuts.
        constraints: modules that stay together on a stage, or stand alone, first or last; an `autopipe.Constraints`.
        plan: a plan to use, or the path of one.
        weights: pretrained weights by the model's names, of which each rank reads its own: a safetensors or torch file,
            the index of several, a folder that holds either, a checkpoint of autopipe, or a state dict. None: the
            model's own; what is on the meta device is initialised by its modules' `reset_parameters`, from `seed`.
        device: where this process's stage runs; None: the CUDA device of `LOCAL_RANK` if there is one, otherwise the
            CPU.
        seed: random state from which every step's dropout follows; None: the generator's own state.
    """

    loss_fn: LossFunction | None = None
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    num_stages: int | Auto = "auto"
    num_microbatches: int | Auto = "auto"
    schedule: str = "auto"
    data_parallel: int | Auto = "auto"
    zero_stage: int | Auto = "auto"
    shard_batch: bool = True
    precision: str = "fp32"
    accumulate_batches: int = 1
    predict_on: Literal["all", "last"] = "all"
    compile: bool = False
    max_grad_norm: float | None = None
    loss_weight: Callable[[Any], float | Tensor] | None = None
    self_check: bool = True
    recompute: str = "auto"
    memory_limit: int | None = None
    split_points: Sequence[str] | None = None
    constraints: Constraints | None = None
    plan: Plan | None = None
    weights: Mapping[str, Tensor] | str | Path | None = None
    device: torch.device | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_stages", "num_microbatches", "data_parallel"):
            value = getattr(self, name)
            if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise _wrong(name, value, "'auto' or a whole number of at least 1")
        if self.schedule not in ("auto", *TRAINING):
            raise _wrong("schedule", self.schedule, f"'auto' or one of {', '.join(TRAINING)}")
        if not isinstance(self.accumulate_batches, int) or self.accumulate_batches < 1:
            raise _wrong("accumulate_batches", self.accumulate_batches, "a whole number of at least 1")
        if self.accumulate_batches > 1 and self.optimizer is None:
            raise _wrong(
                "accumulate_batches", self.accumulate_batches, "an optimizer= with it, which is stepped less often"
            )
        if self.predict_on not in ("all", "last"):
            raise _wrong("predict_on", self.predict_on, "'all' or 'last'")
        if self.zero_stage in (2, 3):
            raise ConfigError(
                f"zero_stage = {self.zero_stage}",
                expected="0 or 1",
                where="autopipe.pipeline()",
                remedy="use zero_stage=1: under pipelining the communication of ZeRO-2 and 3 would recur for every "
                "micro-batch",
            )
        if self.zero_stage not in ("auto", 0, 1):
            raise _wrong("zero_stage", self.zero_stage, "'auto', 0 or 1")
        if self.zero_stage == 1 and self.optimizer is None:
            raise _wrong("zero_stage", 1, "an optimizer= with it, whose state can be sharded")
        if self.precision not in PRECISIONS:
            raise _wrong("precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        if self.precision == "bf16-params" and self.optimizer is None:
            raise _wrong("precision", self.precision, "an optimizer= with it, which has the fp32 master copies")
        if self.precision == "bf16-params" and not hasattr(torch.Tensor, "grad_dtype"):
            raise _wrong("precision", self.precision, f"torch 2.10 or later, not {torch.__version__}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise _wrong("max_grad_norm", self.max_grad_norm, "a positive number or None")
        for name in ("loss_fn", "optimizer", "lr_scheduler", "loss_weight"):
            value = getattr(self, name)
            if isinstance(value, torch.optim.Optimizer) or (
                name == "optimizer" and isinstance(value, (list, tuple, dict))
            ):
                raise _not_made(value)
            if value is not None and not callable(value):
                hint = "functools.partial(torch.optim.AdamW, lr=1e-3)" if name == "optimizer" else "a function"
                raise _wrong(name, value, f"something callable, such as {hint}")
        if self.lr_scheduler is not None and self.optimizer is None:
            raise _wrong("lr_scheduler", "a scheduler without an optimizer", "an optimizer with it")
        if self.recompute not in RECOMPUTE:
            raise _wrong("recompute", self.recompute, f"one of {', '.join(RECOMPUTE)}")
        if self.memory_limit is not None and self.memory_limit <= 0:
            raise _wrong("memory_limit", self.memory_limit, "a positive number of bytes or None")


def _not_made(value: Any) -> ConfigError:
    return ConfigError(
        f"optimizer = a {type(value).__name__}",
        expected="a function that makes one optimizer over the parameters of a stage",
        where="autopipe.pipeline()",
        remedy="pass functools.partial(torch.optim.AdamW, lr=1e-3); several optimizers become one with "
        "parameter groups, made by a function of `named_parameters`",
    )


def _wrong(name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"{name} = {value!r}", expected=expected, where="autopipe.pipeline()", remedy=f"pass another {name}"
    )
