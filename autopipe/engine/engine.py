"""The engine: a batch in, a training step or an evaluation over all stages done, the loss out, the same on every rank."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopipe.config import PipelineConfig
from autopipe.engine.batch import MicroBatch, check_device, split, weights
from autopipe.engine.clock import StepClock
from autopipe.engine.context import Context
from autopipe.engine.failure import FailureBoard
from autopipe.engine.interpreter import ActionFailure, run_actions
from autopipe.engine.measure import Measurements, merge_timelines
from autopipe.engine.parameters import StageParameters
from autopipe.engine.planning import compare_ranks, make_plan, num_microbatches_of, num_stages_of, precision_context
from autopipe.engine.programs import Kind, Program, capture_program, follow_program, make_program, mode_of, set_mode
from autopipe.engine.stage_run import StageRun
from autopipe.engine.transport import Transport
from autopipe.errors import AutopipeError, EngineError
from autopipe.placement import owners, with_unread
from autopipe.plan import Plan
from autopipe.report import chrome_trace
from autopipe.report.measured import measured_report
from autopipe.schedule import Edge, Schedule, build_schedule, check_schedule
from autopipe.simulate import plan_costs
from autopipe.stages import placement


class Engine:
    """Trains a model as a pipeline over the processes of the launch; on one process, as one stage.

    Made by `autopipe.pipeline`. The model is captured and planned at the first batch, or at once where an example was given.
    Every rank makes the same calls with the same batch.
    """

    def __init__(self, model: nn.Module, config: PipelineConfig, context: Context) -> None:
        self._model: nn.Module | None = model
        self._config, self._context = config, context
        self._num_stages = num_stages_of(config, context)
        self._num_microbatches = num_microbatches_of(config, self._num_stages)
        self._stage = context.rank
        self._rank_of = list(range(self._num_stages))
        self._transport = Transport(context)
        self._failure = FailureBoard(context)
        self._flags = {m: m.training for m in model.modules()}
        self._modes = precision_context(config, context.device)
        self._training = True
        self._plan: Plan | None = None
        self._parameters: StageParameters | None = None
        self._programs: dict[str, Program] = {}
        self._schedules: dict[tuple[Any, ...], Schedule] = {}
        self._measured = Measurements()
        self._broken: EngineError | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.lr_scheduler: Any = None
        self.grad_norm: float | None = None

    # -- what users call ----------------------------------------------------------------------------------------------

    def train_batch(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """One training step on a whole batch.

        With an optimizer it clears gradients, runs the schedule, clips, and steps optimizer and scheduler; gradients stay
        readable until the next call. Without one, gradients are added to those that are there, as in PyTorch.

        Args:
            args, kwargs: the batch, as the model takes it; tensors whose first dimension is the batch size are split.
            target: goes to `loss_fn(output, target)`.

        Returns:
            The mean loss over the batch, a float32 scalar on the CPU, the same on every rank.

        Raises:
            EngineError: a rank failed; the message is the first rank's, on every rank.
            CaptureError, PartitionError, ConfigError: the model or the call cannot be run.
        """
        microbatches = self._microbatches(args, kwargs, target)
        self.prepare(microbatches[0])
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        parameters = self._placed()
        earlier = parameters.set_aside()
        run = self._run("train", microbatches, self._training)
        parameters.put_back(earlier)
        loss = self._share_loss(run)
        if self._config.max_grad_norm is not None:
            self.grad_norm = parameters.clip(self._config.max_grad_norm)
        if self.optimizer is not None:
            self.optimizer.step()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return loss

    def eval_batch(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """The mean loss of a batch in evaluation mode: forward only, nothing kept. Arguments and result as in `train_batch`."""
        microbatches = self._microbatches(args, kwargs, target)
        self.prepare(microbatches[0])
        return self._share_loss(self._run("eval", microbatches, False))

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for a batch in evaluation mode, in the model's own structure, on every rank.

        Tensors that come in micro-batches are put together along dimension 0, scalars are averaged over the samples.
        """
        microbatches = self._microbatches(args, kwargs, None)
        if self._plan is None and self._config.loss_fn is None:
            self.prepare(microbatches[0])
        self._require_plan("predict()")
        run = self._run("predict", microbatches, False)
        outputs = self._share_outputs(run)
        return run.programs[0].captured.unflatten(outputs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, for an optimizer of your own: `torch.optim.AdamW(engine.parameters())`."""
        return (p for _, p in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under the model's names, frozen ones too."""
        self._require_plan("named_parameters()")
        return self._placed().named_parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's state under the model's names, on the CPU of every rank. All ranks must call it."""
        self._require_plan("state_dict()")
        return self._placed().state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads a whole model's state; each rank takes its share."""
        self._require_plan("load_state_dict()")
        self._placed().load_state_dict(state)

    def train(self, mode: bool = True) -> Engine:
        """Lets `train_batch` run the model in training mode (dropout on), or not. Evaluation never does."""
        self._training = mode
        return self

    def eval(self) -> Engine:
        """Lets `train_batch` run the model in evaluation mode."""
        return self.train(False)

    @property
    def plan(self) -> Plan:
        """The plan that is run."""
        self._require_plan("plan")
        assert self._plan is not None
        return self._plan

    @property
    def num_microbatches(self) -> int:
        """Micro-batches in a batch that has samples enough."""
        return self._num_microbatches

    @property
    def stage(self) -> int:
        """The stage of this rank."""
        return self._stage

    @property
    def device(self) -> torch.device:
        """The device of this rank's stage; batches must lie on it."""
        return self._context.device

    def report(self, format: str = "table") -> str:
        """The plan, and beside its predictions what the last training steps took, stage by stage. All ranks must call it.

        Args:
            format: `table`, `json`, `csv`, `md` or `html`.
        """
        stages = self._context.gather(self._measured.summary(self._context.device))
        return measured_report(self.plan, stages, format)

    def trace(self, path: str | Path) -> None:
        """Writes the last training step, every action of every rank on one clock, as a trace for Perfetto. All ranks must call it."""
        timeline = merge_timelines(self._context.gather(self._measured.last_step()))
        if self._context.rank == 0:
            Path(path).write_text(json.dumps(chrome_trace(timeline)))

    def close(self) -> None:
        """Leaves the process groups that the engine has made. The engine cannot be used afterwards."""
        self._transport.close()
        self._context.close()

    # -- the first batch ----------------------------------------------------------------------------------------------

    def prepare(self, microbatch: MicroBatch) -> None:
        """Captures, plans, and places the model, unless that is done. Collective."""
        if self._plan is not None:
            return
        config, context, model = self._config, self._context, self._model
        assert model is not None

        def captured_here() -> Any:
            check_device(microbatch, context.device)
            with mode_of(model, True, self._flags):
                check = config.self_check and context.rank == 0
                return capture_program(model, microbatch, "train", config.loss_fn, check=check, modes=self._modes)

        captured = context.agree(captured_here)
        plan = context.agree(lambda: make_plan(captured, microbatch, config, context, self._num_microbatches, model))
        stage_of = context.agree(lambda: placement(captured, plan))
        compare_ranks(context, captured, plan)
        self._owned = with_unread(model, owners(captured, stage_of), captured.names)
        parameters = StageParameters(model, captured.names, self._owned, self._stage, context, self._rank_of)
        parameters.open(self._transport)
        self._parameters, self._plan, self._names = parameters, plan, captured.names
        program = context.agree(lambda: make_program(captured, stage_of, self._num_stages, self._stage))
        self._add_program(self._key("train", True, microbatch), program)
        context.agree(self._make_optimizer)

    def _make_optimizer(self) -> None:
        trainable = self._placed().trainable()
        if self._config.optimizer is not None and trainable:
            self.optimizer = self._config.optimizer(trainable)
            if self._config.lr_scheduler is not None:
                self.lr_scheduler = self._config.lr_scheduler(self.optimizer)

    def _placed(self) -> StageParameters:
        assert self._parameters is not None
        return self._parameters

    def _require_plan(self, what: str) -> None:
        if self._plan is None:
            raise EngineError(
                f"{what} before the first batch",
                expected="a model that is planned",
                remedy="pass example_args to autopipe.pipeline(), or call train_batch() first",
            )

    # -- programs and schedules ---------------------------------------------------------------------------------------

    def _microbatches(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> list[MicroBatch]:
        if self._broken is not None:
            raise self._broken
        microbatches = split(args, kwargs, target, self._num_microbatches)
        if self._plan is not None:
            check_device(microbatches[0], self._context.device)
        return microbatches

    def _key(self, kind: Kind, training: bool, microbatch: MicroBatch) -> str:
        frozen = (
            ""
            if self._parameters is None
            else "".join("01"[p.requires_grad] for _, p in self._parameters.named_parameters())
        )
        return f"{kind}|{training}|{frozen}|{microbatch.signature()}"

    def _add_program(self, key: str, program: Program) -> None:
        self._programs[key] = program
        flows = [(self._rank_of[e.source], self._rank_of[e.target]) for e in program.edges]
        flows += [(self._rank_of[e.target], self._rank_of[e.source]) for e in program.edges if e.backward]
        self._transport.open(flows)

    def _program(self, kind: Kind, training: bool, microbatch: MicroBatch) -> Program:
        """The program for a micro-batch's signature, captured when it is first seen."""
        key = self._key(kind, training, microbatch)
        if key not in self._programs:
            model = self._model
            assert model is not None

            def build() -> Program:
                check_device(microbatch, self._context.device)
                with mode_of(model, training, self._flags):
                    captured = capture_program(
                        model, microbatch, kind, self._config.loss_fn, check=False, modes=self._modes
                    )
                return follow_program(captured, self._owned, self._num_stages, self._stage)

            program = self._context.agree(build)
            self._context.require_equal(program.captured.graph_hash, "graph", "pass the same batch shapes on all ranks")
            self._add_program(key, program)
        return self._programs[key]

    def _schedule(self, kind: Kind, edges: tuple[Edge, ...], num_microbatches: int) -> Schedule:
        key = (kind == "train", edges, num_microbatches)
        if key not in self._schedules:
            plan = self.plan
            name = plan.schedule if kind == "train" else "forward"
            groups = self._placed().tie_groups if kind == "train" else ()
            schedule = build_schedule(
                name, self._num_stages, num_microbatches, edges, costs=plan_costs(plan), reductions=groups
            )
            check_schedule(schedule)
            self._schedules[key] = schedule
        return self._schedules[key]

    # -- one step -----------------------------------------------------------------------------------------------------

    def _run(self, kind: Kind, microbatches: list[MicroBatch], training: bool) -> StageRun:
        """Runs all micro-batches through this rank's stage."""
        shares = weights(microbatches, self._config.loss_weight) if kind != "predict" else [1.0] * len(microbatches)
        self._compare_calls(kind, training, microbatches)
        programs = [self._program(kind, training, m) for m in microbatches]
        edges = _union([p.edges for p in programs])
        schedule = self._schedule(kind, edges, len(microbatches))
        for program in dict.fromkeys(id(p) for p in programs):
            module = next(p.module for p in programs if id(p) == program)
            set_mode(module, training, self._flags)
        run = StageRun(
            stage=self._stage,
            programs=programs,
            microbatches=microbatches,
            weights=shares,
            transport=self._transport,
            rank_of=self._rank_of,
            training=kind == "train",
            with_target=self._config.loss_fn is not None and kind != "predict",
            clock=StepClock(self._context.device),
        )
        grad = contextlib.nullcontext() if kind == "train" else torch.no_grad()
        try:
            with grad, self._modes():
                run_actions(schedule.actions[self._context.rank], run, self._placed().reduce_tied)
                run.finish()
        except ActionFailure as failure:
            raise self._fail(failure.phase, failure.cause) from failure.cause
        except Exception as cause:
            raise self._fail("the end of the step", cause) from cause
        if kind == "train":
            self._measured.add(run)
        return run

    def _fail(self, phase: str, cause: BaseException) -> EngineError:
        message = f"stage {self._stage} on rank {self._context.rank}, {phase}: {type(cause).__name__}: {cause}"
        error = self._failure.fail(message, lost_connection=_is_connection_error(cause), transport=self._transport)
        self._broken = error
        return error

    def _compare_calls(self, kind: Kind, training: bool, microbatches: list[MicroBatch]) -> None:
        """Ranks that were given different calls or batches would wait for each other: they compare a digest first."""
        if self._context.control is None:
            return
        digest = zlib.crc32("|".join([kind, str(training), *(m.signature() for m in microbatches)]).encode())
        bounds = torch.tensor([digest, -digest])
        try:
            self._transport.all_reduce(bounds, dist.ReduceOp.MAX)
        except RuntimeError as cause:
            raise self._fail("comparing the call with the other ranks", cause) from cause
        if bounds[0] != -bounds[1]:
            calls = self._context.gather((kind, [m.num_samples for m in microbatches], microbatches[0].signature()))
            other = next((r for r, c in enumerate(calls) if c != calls[0]), 0)
            raise EngineError(
                f"rank 0 calls {calls[0]}, rank {other} calls {calls[other]}",
                expected="the same call with a batch of the same shape on every rank",
                remedy="give every rank the same batch; seed the sampler of the data loader equally",
            )

    def _share_loss(self, run: StageRun) -> Tensor:
        stage = run.programs[0].loss_stage
        assert stage is not None
        loss = run.loss if run.loss is not None else torch.zeros(())
        try:
            return self._transport.broadcast(loss.to("cpu"), self._rank_of[stage])
        except RuntimeError as cause:
            raise self._fail("sharing the loss", cause) from cause

    def _share_outputs(self, run: StageRun) -> list[Tensor]:
        """The graph's outputs over the whole batch, from the last stage to every rank."""
        merged: list[Tensor] | None = None
        if self._stage == self._num_stages - 1:
            sizes = [m.num_samples for m in run.microbatches]
            count = len(run.results[0])
            merged = [
                _merge([run.results[m][i].detach().cpu() for m in range(len(sizes))], sizes) for i in range(count)
            ]
        outputs = self._context.gather(merged)[-1]
        assert outputs is not None
        return [o.to(self._context.device) for o in outputs]


def _union(edge_sets: list[tuple[Edge, ...]]) -> tuple[Edge, ...]:
    """The stage graph of a step whose micro-batches may have different ones."""
    backward: dict[tuple[int, int], bool] = {}
    for edges in edge_sets:
        for e in edges:
            backward[e.source, e.target] = backward.get((e.source, e.target), False) or e.backward
    return tuple(Edge(s, t, b) for (s, t), b in sorted(backward.items()))


def _merge(parts: list[Tensor], sizes: list[int]) -> Tensor:
    """One output over the micro-batches."""
    if all(p.dim() > 0 and p.shape[0] == n for p, n in zip(parts, sizes, strict=True)):
        return torch.cat(parts)
    if len(parts) == 1 or all(torch.equal(p, parts[0]) for p in parts[1:] if p.shape == parts[0].shape):
        return parts[0]
    if parts[0].dim() == 0 and parts[0].is_floating_point():
        return sum(p * (n / sum(sizes)) for p, n in zip(parts, sizes, strict=True))  # type: ignore[return-value]
    raise EngineError(
        f"an output of shape {tuple(parts[0].shape)} whose first dimension is not the batch's",
        expected="outputs with one row for each sample, or scalars",
        where="predict()",
        remedy="return it with the batch as dimension 0",
    )


def _is_connection_error(cause: BaseException) -> bool:
    """Whether a rank has only noticed that another is gone."""
    if isinstance(cause, AutopipeError) or not isinstance(cause, (RuntimeError, ConnectionError, OSError)):
        return False
    text = str(cause)
    return any(
        word in text for word in ("Connection closed", "Connection reset", "gloo", "NCCL", "Broken pipe", "Socket")
    )
