"""Runs a call over this rank's stages: the programs and schedules it needs, made when they are first seen, and one step of actions."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopipe.capture import Captured
from autopipe.capture.seeding import RandomSource, generators_kept
from autopipe.config import PipelineConfig
from autopipe.engine.ranks.context import Context
from autopipe.engine.ranks.mesh import ProcessMesh
from autopipe.engine.step.batch_shard import BatchShard
from autopipe.engine.step.call_check import CallComparison, LossSum, NeighbourComparison, compare_calls
from autopipe.engine.step.clock import StepClock
from autopipe.engine.step.interpreter import ActionFailure, run_actions
from autopipe.engine.step.microbatch import MicroBatch
from autopipe.engine.step.precision import precision_context
from autopipe.engine.step.programs import Kind, Program, capture_program, make_program, mode_of, set_mode
from autopipe.engine.step.stage_executor import StageRun, Step
from autopipe.engine.transport.p2p import Transport
from autopipe.placement import follow
from autopipe.plan import Plan
from autopipe.schedule import Edge, Schedule, build_schedule, check_schedule
from autopipe.simulate import plan_costs
from autopipe.stages import regions_of
from profiler.memory import peak_memory

Comparison = CallComparison | NeighbourComparison
MAX_PROGRAMS = 64
"""Signatures that are kept captured; the one used longest ago is dropped."""


class Runner:
    """Executes calls once the model is placed.

    Args:
        owned: the stages that hold each parameter and buffer; later graphs follow them.
        tie_groups: the sets of stages that share parameters.
        flags: the training flag that the user gave each module.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PipelineConfig,
        context: Context,
        layout: ProcessMesh,
        transport: Transport,
        plan: Plan,
        owned: Mapping[str, tuple[int, ...]],
        tie_groups: Sequence[tuple[int, ...]],
        flags: Mapping[nn.Module, bool],
        seed: int,
    ) -> None:
        self._model, self._config, self._context, self._layout, self._transport = (
            model,
            config,
            context,
            layout,
            transport,
        )
        self._plan, self._owned, self._tie_groups, self._flags, self.seed = plan, owned, tuple(tie_groups), flags, seed
        self._modes = precision_context(config, context.device)
        self._parameters = list(model.parameters())
        self.planned: dict[str, int] = {}
        self._random = RandomSource()
        self._programs: dict[str, Program] = {}
        self._schedules: dict[tuple[Any, ...], Schedule] = {}
        self._counted = False

    # -- programs and schedules ---------------------------------------------------------------------------------------

    def add_program(
        self, kind: Kind, training: bool, microbatch: MicroBatch, captured: Captured, stage_of: Mapping[str, int]
    ) -> None:
        """Keeps the program of the graph that was planned. Collective."""
        self._keep(kind, self._key(kind, training, microbatch), captured, stage_of)

    def _keep(self, kind: Kind, key: str, captured: Captured, stage_of: Mapping[str, int]) -> Program:
        program = make_program(
            kind,
            captured,
            stage_of,
            self._layout,
            self._random,
            compiled=self._config.compile,
            recompute=regions_of(self._plan),
        )
        self._transport.open(_flows(program.edges, self._layout))
        self._programs[key] = program
        if len(self._programs) > MAX_PROGRAMS:
            del self._programs[next(iter(self._programs))]
        return program

    def _key(self, kind: Kind, training: bool, microbatch: MicroBatch) -> str:
        return self._keys(kind, training, [microbatch])[0]

    def _keys(self, kind: Kind, training: bool, microbatches: Sequence[MicroBatch]) -> list[str]:
        frozen = zlib.crc32(bytes(p.requires_grad for p in self._parameters))
        return [f"{kind}|{training}|{frozen}|{m.signature}" for m in microbatches]

    def _ensure(self, kind: Kind, training: bool, wanted: Mapping[str, MicroBatch]) -> None:
        """Captures what is needed and not there yet, in the same order on every rank. Collective."""
        new = {key: m for key, m in wanted.items() if key not in self._programs}
        if (
            self._layout.data_parallel > 1
        ):  # replicas may have micro-batches of different shapes: each makes the programs of all
            anything = torch.tensor(int(bool(new)))
            self._transport.all_reduce(anything, dist.ReduceOp.MAX)
            if not anything:
                return
            parts = self._context.gather({key: m.template() for key, m in new.items()})
            new = {key: m for part in parts for key, m in part.items() if key not in self._programs}
        for key, microbatch in new.items():
            self._build(key, kind, training, microbatch)

    def _build(self, key: str, kind: Kind, training: bool, microbatch: MicroBatch) -> None:
        def captured_here() -> tuple[Captured, dict[str, int]]:
            with mode_of(self._model, training, self._flags):
                captured = capture_program(
                    self._model, microbatch, kind, self._config.loss_fn, check=False, modes=self._modes
                )
            same_nodes = self.planned.keys() == {n.name for n in captured.nodes}
            return captured, dict(self.planned) if same_nodes else follow(captured, self._owned)

        captured, stage_of = self._context.agree(captured_here)
        self._context.require_equal(captured.graph_hash, "graph", "pass batches of the same shapes on all ranks")
        self._keep(kind, key, captured, stage_of)

    def _program(self, key: str) -> Program:
        self._programs[key] = self._programs.pop(key)  # the most recent stands last
        return self._programs[key]

    def _schedule(self, kind: Kind, edges: tuple[Edge, ...], num_microbatches: int) -> Schedule:
        key = (kind == "train", edges, num_microbatches)
        if key not in self._schedules:
            schedule = build_schedule(
                self._plan.schedule if kind == "train" else "forward",
                self._layout.num_stages,
                num_microbatches,
                edges,
                costs=plan_costs(self._plan),
                reductions=self._tie_groups if kind == "train" else (),
                num_ranks=self._layout.num_ranks,
            )
            check_schedule(schedule)
            self._schedules[key] = schedule
        return self._schedules[key]

    # -- one step -----------------------------------------------------------------------------------------------------

    def run(
        self,
        kind: Kind,
        training: bool,
        share: BatchShard,
        number: int,
        *,
        loss_scale: float = 1.0,
        reduce: Callable[[int], None],
        stage_done: Callable[[int], None],
    ) -> tuple[Step, list[StageRun]]:
        """Runs this replica's micro-batches through this rank's stages.

        Args:
            training: the model is in training mode.
            number: of the step, from which random operations follow.
            reduce, stage_done: as in `run_actions`.

        Raises:
            EngineError: a rank has failed.
        """
        comparison = compare_calls(
            self._context,
            self._layout,
            self._transport,
            kind,
            training,
            share.given,
            shared=self._config.shard_batch,
        )
        keys = self._keys(kind, training, share.microbatches)
        if self._layout.data_parallel > 1 or any(key not in self._programs for key in keys):
            self._finish(comparison)
            self._ensure(kind, training, dict(zip(keys, share.microbatches, strict=True)))
        programs = [self._program(key) for key in keys]
        different = list({id(p): p for p in programs}.values())
        for program in different:
            for module in program.modules.values():
                set_mode(module, training, self._flags)
        step = Step(
            programs=programs,
            microbatches=share.microbatches,
            weights=share.weights,
            training=kind == "train",
            with_target=self._config.loss_fn is not None and kind != "predict",
            layout=self._layout,
            transport=self._transport,
            clock=StepClock(self._context.device, self._context.watcher),
            random=self._random,
            seed=self.seed,
            number=number,
            first_microbatch=share.first,
            loss_scale=loss_scale,
            loss=None if kind == "predict" else self._loss_sum(programs),
        )
        runs = {s: StageRun(s, step) for s in self._layout.stages}
        if share.microbatches:
            schedule = self._schedule(kind, _union([p.edges for p in different]), len(share.microbatches))
            self._execute(schedule, step, runs, reduce, stage_done, comparison)
        elif kind == "train":
            for stage in self._layout.stages:
                stage_done(stage)
            for group, stages in enumerate(self._tie_groups):
                if any(self._layout.is_mine(s) for s in stages):
                    reduce(group)
        self._finish(comparison)
        return step, list(runs.values())

    def _loss_sum(self, programs: Sequence[Program]) -> LossSum:
        mine = [p for p in programs if p.loss_stage is not None and self._layout.is_mine(p.loss_stage)]
        return LossSum(self._context, len(mine))

    def _finish(self, comparison: Comparison) -> None:
        with self._context.watcher.waiting("comparing the call with the other ranks"):
            comparison.finish()

    def _execute(
        self,
        schedule: Schedule,
        step: Step,
        runs: dict[int, StageRun],
        reduce: Any,
        stage_done: Any,
        comparison: Comparison,
    ) -> None:
        actions = schedule.actions[self._layout.pipeline_rank]
        grad = contextlib.nullcontext() if step.training else torch.no_grad()
        try:
            with generators_kept(), grad, self._modes(), self._memory(step):
                run_actions(actions, runs, reduce, stage_done, lambda: self._finish(comparison))
                if step.loss is not None:
                    step.loss.start()
                self._context.watcher.enter("the end of the step", waiting=True)
                for run in runs.values():
                    run.finish()
        except ActionFailure as failure:
            error = self._context.watcher.fail(failure.cause, stage=failure.stage, phase=failure.phase)
            raise error from failure.cause

    @contextlib.contextmanager
    def _memory(self, step: Step) -> Iterator[None]:
        """On a CPU, with AUTOPIPE_COUNT_MEMORY=1, counts what the first training step allocates: it warms up and is not timed.

        It is asked for, since torch's allocator then writes a line to stderr about memory that it cannot count.
        """
        asked = os.environ.get("AUTOPIPE_COUNT_MEMORY") == "1" and self._context.device.type == "cpu"
        if self._counted or not asked or not step.training or torch.autograd._profiler_enabled():
            yield
            return
        with peak_memory(self._context.device) as peak:
            yield
        self._counted, step.clock.allocated_bytes = True, peak.num_bytes

    def predicted(self, step: Step, microbatches: Sequence[MicroBatch]) -> Captured:
        """The captured graph of a prediction, which knows the output's structure; also on a replica without micro-batches."""
        if step.programs:
            return step.programs[0].captured
        return self._program(self._key("predict", False, microbatches[0])).captured

    def share_loss(self, step: Step) -> Tensor:
        """The sum of the weighted losses over all stages and replicas, on every rank."""
        assert step.loss is not None, "a prediction has no loss"
        return step.loss.finish()


def _flows(edges: Sequence[Edge], layout: ProcessMesh) -> list[tuple[int, int]]:
    """The flows of a stage graph in every replica, both directions, without those within a rank."""
    flows = []
    for replica in range(layout.data_parallel):
        for e in edges:
            a, b = layout.rank_of(e.source, replica), layout.rank_of(e.target, replica)
            flows += [(a, b), (b, a)] if e.backward else [(a, b)]
    return [f for f in flows if f[0] != f[1]]


def _union(edge_sets: Sequence[tuple[Edge, ...]]) -> tuple[Edge, ...]:
    """The stage graph of a step whose micro-batches may have different ones."""
    backward: dict[tuple[int, int], bool] = {}
    for edges in edge_sets:
        for e in edges:
            backward[e.source, e.target] = backward.get((e.source, e.target), False) or e.backward
    return tuple(Edge(s, t, b) for (s, t), b in sorted(backward.items()))
