"""What can be read off an engine: its plan, its place among the ranks, the optimizer, and what its steps took."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from autopipe.config import PipelineConfig
from autopipe.engine.failures.monitor import RankMonitor, watched
from autopipe.engine.ranks.context import Context
from autopipe.engine.ranks.mesh import MeshShape, ProcessMesh, make_mesh
from autopipe.engine.state.optimizer import ShardedOptimizer
from autopipe.engine.state.parameters import StageParameters
from autopipe.engine.step.step_stats import Measurements, merge_timelines, transfer_times_us
from autopipe.engine.transport.p2p import Transport
from autopipe.errors import EngineError
from autopipe.plan import Plan
from autopipe.report import chrome_trace
from autopipe.report.measured import measured_report


class EngineState:
    """The engine's state, and what users read of it. `_plan`, `_parameters` and `_optimizing` are None before the first batch, `_laid`
    where the planner is to choose the layout."""

    def __init__(self, config: PipelineConfig, context: Context) -> None:
        self._config, self._context = config, context
        self._laid: ProcessMesh | None = None
        self._num_microbatches = 0
        self._transport = Transport(context)
        self._measured = Measurements()
        self._plan: Plan | None = None
        self._parameters: StageParameters | None = None
        self._optimizing: ShardedOptimizer | None = None

    def _lay_out(self, shape: MeshShape, num_microbatches: int) -> None:
        """Settles which rank runs what, and makes the process groups. Collective."""
        self._laid, self._num_microbatches = make_mesh(self._context, shape), num_microbatches
        self.watcher.stage = self._laid.stages[0]

    @property
    def _layout(self) -> ProcessMesh:
        if self._laid is None:
            raise _not_laid_out()
        return self._laid

    @watched
    def report(self, format: str = "table") -> str:
        """The plan, and beside its predictions what the last training steps took, stage by stage. All ranks must call it.

        Args:
            format: `table` (a notebook shows it as HTML), `json`, `csv`, `md` or `html`.
        """
        first = self._layout.shape.replicas[0]
        ranks = self._context.gather(self._measured.summaries(self._context.device, self._held_bytes()))
        last = self._context.gather(self._measured.last_step())
        steps = [last[rank] for rank in first]
        transfers = transfer_times_us(steps)
        stages = [
            dataclasses.replace(s, transfer_us=transfers.get(s.index, 0.0)) for rank in first for s in ranks[rank]
        ]
        timeline = merge_timelines(steps) if stages else None
        return measured_report(self.plan, sorted(stages, key=lambda s: s.index), format, timeline=timeline)

    def _held_bytes(self) -> int:
        """Parameters, buffers and optimizer state of this rank."""
        if self._parameters is None:
            return 0
        held = [*(p for _, p in self._parameters.named_parameters()), *self._parameters.buffers()]
        optimizer = self.optimizer
        if optimizer is not None:
            held += [p for group in optimizer.param_groups for p in group["params"]]
            held += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
        return sum(storages.values())

    @watched
    def trace(self, path: str | Path) -> None:
        """Writes the last training step, every action of every rank on one clock, as a trace for Perfetto. All ranks must call it."""
        timeline = merge_timelines(self._context.gather(self._measured.last_step()))
        if self._context.rank == 0:
            Path(path).write_text(json.dumps(chrome_trace(timeline)))

    @property
    def plan(self) -> Plan:
        """The plan that is run."""
        self._require_plan("plan")
        assert self._plan is not None
        return self._plan

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """This rank's optimizer; None where none was given, before the first batch, and where nothing here is trained."""
        return None if self._optimizing is None else self._optimizing.optimizer

    @property
    def lr_scheduler(self) -> Any:
        """This rank's learning-rate scheduler, or None."""
        return None if self._optimizing is None else self._optimizing.lr_scheduler

    @property
    def grad_norm(self) -> float | None:
        """The norm of the last step's gradients over all stages, before clipping; None where nothing is clipped."""
        return None if self._optimizing is None else self._optimizing.grad_norm

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped on all ranks because of an fp16 overflow on one."""
        return 0 if self._optimizing is None else self._optimizing.skipped

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a replica, in a batch that has samples enough."""
        if self._laid is None:
            raise _not_laid_out()
        return self._num_microbatches

    @property
    def stage(self) -> int:
        """The (first) stage of this rank."""
        return self._layout.stages[0]

    @property
    def is_first_rank(self) -> bool:
        """Whether this is rank 0, which prints and saves for all."""
        return self._context.rank == 0

    @property
    def device(self) -> torch.device:
        """The device of this rank; batches must lie on it."""
        return self._context.device

    @property
    def watcher(self) -> RankMonitor:
        """Tells the other ranks of failures here, and raises theirs."""
        return self._context.watcher

    def _placed(self) -> StageParameters:
        assert self._parameters is not None
        return self._parameters

    def _optimizer(self) -> ShardedOptimizer:
        assert self._optimizing is not None
        return self._optimizing

    def _require_plan(self, what: str) -> None:
        if self._plan is None:
            raise EngineError(
                f"{what} before the first batch",
                expected="a model that is planned",
                remedy="pass example_args to autopipe.pipeline(), or call train_batch() first",
            )


def _not_laid_out() -> EngineError:
    return EngineError(
        "stages, replicas or micro-batches before the first batch, from which the planner chooses them",
        expected="a model that is planned",
        remedy="pass example_args to autopipe.pipeline(), call train_batch() first, or give num_stages",
    )
