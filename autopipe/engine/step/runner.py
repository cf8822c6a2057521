"""Runs one call over this rank's stages, action by action."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from autopipe.capture import Captured
from autopipe.capture.seeding import generators_kept
from autopipe.config import PipelineConfig
from autopipe.engine.state.gradients import GradientSync
from autopipe.engine.step.batch_shard import BatchShard
from autopipe.engine.step.call_check import CallComparison, LossSum, NeighbourComparison, compare_calls
from autopipe.engine.step.clock import StepClock
from autopipe.engine.step.interpreter import ActionFailure, run_actions
from autopipe.engine.step.microbatch import MicroBatch
from autopipe.engine.step.precision import precision_context
from autopipe.engine.step.program_cache import ProgramCache
from autopipe.engine.step.programs import Kind, Program, set_mode
from autopipe.engine.step.stage_executor import StageRun, Step
from autopipe.engine.transport.peers import Peers
from autopipe.plan import Plan
from autopipe.schedule import Edge, Schedule, build_schedule, check_schedule
from autopipe.schedule.kinds import FORWARD
from autopipe.simulate import plan_costs
from profiler.memory import peak_memory

Comparison = CallComparison | NeighbourComparison


class Runner:
    """Executes calls once the model is placed.

    Args:
        programs: what calls run.
        peers: the ranks that they run on.
        gradients: sums gradients where the schedule says so.

    Attributes:
        seed: from which the random operations of every step follow.
    """

    def __init__(
        self,
        programs: ProgramCache,
        peers: Peers,
        gradients: GradientSync,
        config: PipelineConfig,
        plan: Plan,
        seed: int,
    ) -> None:
        self._programs, self._peers, self._gradients, self._config, self._plan = (
            programs,
            peers,
            gradients,
            config,
            plan,
        )
        self.seed = seed
        self._modes = precision_context(config, peers.context.device)
        self._schedules: dict[tuple[Any, ...], Schedule] = {}
        self._counted = False

    def run(
        self, kind: Kind, training: bool, shard: BatchShard, number: int, *, loss_scale: float = 1.0
    ) -> tuple[Step, list[StageRun]]:
        """Run this replica's micro-batches through this rank's stages.

        Args:
            training: the model is in training mode.
            number: of the step, from which random operations follow.

        Raises:
            EngineError: a rank has failed.
        """
        comparison = compare_calls(self._peers, kind, training, shard.given, shared=self._config.shard_batch)
        programs = self._programs_of(kind, training, shard, comparison)
        step = self._step(kind, programs, shard, number, loss_scale)
        runs = {s: StageRun(s, step) for s in self._peers.mesh.stages}
        if shard.microbatches:
            self._execute(self._schedule(kind, programs), step, runs, comparison)
        elif kind == "train":
            self._reduce_nothing()
        self._finish(comparison)
        return step, list(runs.values())

    def share_loss(self, step: Step) -> Tensor:
        """The sum of the weighted losses over all stages and replicas, on every rank."""
        assert step.loss is not None, "a prediction has no loss"
        return step.loss.finish()

    def predicted(self, step: Step, microbatches: Sequence[MicroBatch]) -> Captured:
        """The captured graph of a prediction, which knows the output's structure; also without micro-batches here."""
        if step.programs:
            return step.programs[0].captured
        return self._programs.get(self._programs.key("predict", False, microbatches[0])).captured

    # -- before the first action --------------------------------------------------------------------------------------

    def _programs_of(self, kind: Kind, training: bool, shard: BatchShard, comparison: Comparison) -> list[Program]:
        """The program of each micro-batch, with its modules in the mode of the call."""
        keys = self._programs.keys(kind, training, shard.microbatches)
        if self._peers.mesh.data_parallel > 1 or not self._programs.has_all(keys):
            self._finish(comparison)  # capturing talks to all ranks, which have to make the same call
            self._programs.ensure(kind, training, dict(zip(keys, shard.microbatches, strict=True)))
        programs = [self._programs.get(key) for key in keys]
        for program in _different(programs):
            for module in program.modules.values():
                set_mode(module, training, self._programs.model.training_flags)
        return programs

    def _step(self, kind: Kind, programs: list[Program], shard: BatchShard, number: int, loss_scale: float) -> Step:
        context, mesh = self._peers.context, self._peers.mesh
        num_losses = sum(p.loss_stage is not None and mesh.is_mine(p.loss_stage) for p in programs)
        return Step(
            programs=programs,
            microbatches=shard.microbatches,
            weights=shard.weights,
            training=kind == "train",
            with_target=self._config.loss_fn is not None and kind != "predict",
            mesh=mesh,
            transport=self._peers.transport,
            clock=StepClock(context.device, context.monitor),
            random=self._programs.random,
            seed=self.seed,
            number=number,
            first_microbatch=shard.first,
            loss_scale=loss_scale,
            loss=None if kind == "predict" else LossSum(context, num_losses),
        )

    def _schedule(self, kind: Kind, programs: list[Program]) -> Schedule:
        edges = _union([p.edges for p in _different(programs)])
        key = (kind == "train", edges, len(programs))
        if key not in self._schedules:
            schedule = build_schedule(
                self._plan.schedule if kind == "train" else FORWARD,
                self._peers.mesh.num_stages,
                len(programs),
                edges,
                costs=plan_costs(self._plan),
                reductions=self._gradients.tie_groups if kind == "train" else (),
                num_ranks=self._peers.mesh.num_ranks,
            )
            check_schedule(schedule)
            self._schedules[key] = schedule
        return self._schedules[key]

    # -- the actions --------------------------------------------------------------------------------------------------

    def _execute(self, schedule: Schedule, step: Step, runs: dict[int, StageRun], comparison: Comparison) -> None:
        actions = schedule.actions[self._peers.mesh.pipeline_rank]
        monitor = self._peers.context.monitor
        grad = contextlib.nullcontext() if step.training else torch.no_grad()
        try:
            with generators_kept(), grad, self._modes(), self._memory(step):
                run_actions(actions, runs, self._gradients, lambda: self._finish(comparison))
                if step.loss is not None:
                    step.loss.start()
                monitor.enter("the end of the step", waiting=True)
                for run in runs.values():
                    run.finish()
        except ActionFailure as failure:
            error = monitor.fail(failure.cause, stage=failure.stage, phase=failure.phase)
            raise error from failure.cause

    def _reduce_nothing(self) -> None:
        """A replica without micro-batches takes part in the reductions of the others."""
        mesh = self._peers.mesh
        for stage in mesh.stages:
            self._gradients.stage_done(stage)
        for group, stages in enumerate(self._gradients.tie_groups):
            if any(mesh.is_mine(s) for s in stages):
                self._gradients.reduce_tied(group)

    def _finish(self, comparison: Comparison) -> None:
        with self._peers.context.monitor.waiting("comparing the call with the other ranks"):
            comparison.finish()

    @contextlib.contextmanager
    def _memory(self, step: Step) -> Iterator[None]:
        """On a CPU, with AUTOPIPE_COUNT_MEMORY=1, count what the first training step allocates: it is not timed.

        It is asked for, since torch's allocator then writes a line to stderr about memory that it cannot count.
        """
        device = self._peers.context.device
        asked = os.environ.get("AUTOPIPE_COUNT_MEMORY") == "1" and device.type == "cpu"
        if self._counted or not asked or not step.training or torch.autograd._profiler_enabled():
            yield
            return
        with peak_memory(device) as peak:
            yield
        self._counted, step.clock.allocated_bytes = True, peak.num_bytes


def _different(programs: Sequence[Program]) -> list[Program]:
    return list({id(p): p for p in programs}.values())


def _union(edge_sets: Sequence[tuple[Edge, ...]]) -> tuple[Edge, ...]:
    """The stage graph of a step whose micro-batches may have different ones."""
    backward: dict[tuple[int, int], bool] = {}
    for edges in edge_sets:
        for e in edges:
            backward[e.source, e.target] = backward.get((e.source, e.target), False) or e.backward
    return tuple(Edge(s, t, b) for (s, t), b in sorted(backward.items()))
