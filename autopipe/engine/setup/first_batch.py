"""From a model and its first batch to a `Prepared` one: captured, planned, and placed on the ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from autopipe.capture import Captured
from autopipe.checkpoint import Reader, open_weights
from autopipe.config import PipelineConfig
from autopipe.engine.ranks.context import Context
from autopipe.engine.ranks.mesh import MeshShape, make_mesh, mesh_shape, mesh_shape_of_plan
from autopipe.engine.setup.auto_plan import left_to_search, search_plan
from autopipe.engine.setup.place_parameters import place, release
from autopipe.engine.setup.planning import capture_first, compare_ranks, num_microbatches_of, plan_layout
from autopipe.engine.setup.prepared import Launch, Prepared
from autopipe.engine.state.gradients import GradientSync
from autopipe.engine.state.loss_scale import LossScale
from autopipe.engine.state.master_weights import Originals, lower
from autopipe.engine.state.optimizer import ShardedOptimizer
from autopipe.engine.state.parameters import StageParameters
from autopipe.engine.state.replicas import Replicas
from autopipe.engine.step.microbatch import Batch, MicroBatch
from autopipe.engine.step.program_cache import PlacedModel, ProgramCache
from autopipe.engine.step.runner import Runner
from autopipe.engine.transport.p2p import Transport
from autopipe.engine.transport.peers import Peers
from autopipe.errors import EngineError
from autopipe.placement import owners, with_unread
from autopipe.plan import Plan
from autopipe.stages import placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Unprepared:
    """An engine's state before its first batch.

    Attributes:
        model, config, context, transport: what the engine was made of.
        training_flags: the training flag that the user gave each module.
        requested: how the processes are used; None if the planner is to choose it by the first batch.
        resume: a checkpoint that is loaded once the model is placed.
    """

    model: nn.Module
    config: PipelineConfig
    context: Context
    transport: Transport
    training_flags: Mapping[nn.Module, bool]
    requested: Launch | None
    resume: Reader | None = None

    @property
    def launch(self) -> Launch:
        """The use of the processes.

        Raises:
            EngineError: the planner is to choose it by the first batch.
        """
        if self.requested is not None:
            return self.requested
        raise EngineError(
            "stages, replicas or micro-batches before the first batch, from which the planner chooses them",
            expected="a model that is planned",
            remedy="pass example_args to autopipe.pipeline(), call train_batch() first, or give num_stages",
        )

    def prepare(self, batch: Batch, *, for_output: bool = False) -> Prepared:
        """Capture, plan and place the model by a first batch. Collective.

        Args:
            for_output: there is no target, and there may be no loss: the way to the output is planned.

        Raises:
            CaptureError, ProfileError, PartitionError, PlanError, ConfigError: planning failed; on every rank.
        """
        config, context, model = self.config, self.context, self.model
        context.monitor.enter("capturing and planning")
        originals = lower(model) if config.precision == "bf16-params" else {}
        given = config.weights
        weights = context.agree(lambda: open_weights(given) if isinstance(given, (str, Path)) else given)
        launch, captured, microbatch, plan = self._planned(batch, for_output)
        stage_of = context.agree(lambda: placement(captured, plan))
        compare_ranks(context, captured, plan)
        owned = with_unread(model, owners(captured, stage_of), captured.names)
        seed = context.gather(torch.initial_seed() if config.seed is None else config.seed)[0]
        self._place(launch, captured, owned, weights, originals, seed)
        placed = PlacedModel(module=model, training_flags=self.training_flags, owned=owned, planned=dict(stage_of))
        prepared = self._prepared(launch, captured, plan, placed, originals, seed)
        if captured.loss is not None:
            prepared.programs.add("train", True, microbatch, captured)
        if self.resume is not None:
            prepared.load(self.resume)
        return prepared

    def _planned(self, batch: Batch, for_output: bool) -> tuple[Launch, Captured, MicroBatch, Plan]:
        """The use of the processes, the captured graph, the micro-batch that it is of, and its plan."""
        config, context = self.config, self.context
        capture = partial(
            capture_first, self.model, config=config, context=context, flags=self.training_flags, for_output=for_output
        )
        launch = self.requested
        if launch is None and not for_output:
            captured, microbatch, plan = search_plan(batch, config, context, capture)
            shape = mesh_shape_of_plan(plan, config, context.world_size)
            return _launch(context, shape, plan.num_microbatches), captured, microbatch, plan
        if launch is None:  # a prediction has no step to make short
            launch = _launch_as_set(config, context)
        first = launch.split(batch, config)[0]
        return launch, *plan_layout(first, config, context, launch.mesh, launch.num_microbatches, capture)

    def _place(
        self,
        launch: Launch,
        captured: Captured,
        owned: Mapping[str, tuple[int, ...]],
        weights: Mapping[str, Tensor] | None,
        originals: Originals,
        seed: int,
    ) -> None:
        """Put the values of this rank's parameters and buffers on its device, and let go of the others."""
        mine = [n for n, stages in owned.items() if set(stages) & set(launch.mesh.stages)]
        self.context.agree(
            lambda: place(
                self.model,
                mine,
                weights=weights,
                later=self.resume is not None,
                seed=seed,
                device=self.context.device,
                exact=originals,
            )
        )
        release(self.model, captured, mine)

    def _prepared(
        self, launch: Launch, captured: Captured, plan: Plan, placed: PlacedModel, originals: Originals, seed: int
    ) -> Prepared:
        config, context = self.config, self.context
        peers = Peers(context=context, mesh=launch.mesh, transport=self.transport)
        replicas = Replicas(launch.mesh, plan.zero_stage)
        parameters = StageParameters(self.model, captured.names, placed.owned, peers)
        gradients = GradientSync(parameters, replicas, context.monitor)
        programs = ProgramCache(placed, peers, config, plan)
        scale = LossScale.for_precision(config.precision)
        return Prepared(
            config=config,
            launch=launch,
            peers=peers,
            plan=plan,
            parameters=parameters,
            gradients=gradients,
            programs=programs,
            runner=Runner(programs, peers, gradients, config, plan, seed),
            optimizer=context.agree(
                lambda: ShardedOptimizer(config, parameters, replicas, self.transport, scale, originals)
            ),
        )

    def resumed_from(self, reader: Reader) -> Unprepared:
        """The same state, with a checkpoint that is loaded once the model is placed."""
        return dataclasses.replace(self, resume=reader)


def unprepared(model: nn.Module, config: PipelineConfig, context: Context, transport: Transport) -> Unprepared:
    """The state of a new engine. Collective.

    Raises:
        ConfigError, PlanError: the processes of the launch cannot be used as the settings or the plan say.
    """
    mesh_shape(config, context.world_size)
    open_choice = left_to_search(config, context.world_size)
    return Unprepared(
        model=model,
        config=config,
        context=context,
        transport=transport,
        training_flags={m: m.training for m in model.modules()},
        requested=None if open_choice else _launch_as_set(config, context),
    )


def _launch_as_set(config: PipelineConfig, context: Context) -> Launch:
    """The launch that the settings describe. Collective."""
    shape = mesh_shape(config, context.world_size)
    return _launch(context, shape, num_microbatches_of(config, shape.num_stages))


def _launch(context: Context, shape: MeshShape, num_microbatches: int) -> Launch:
    """Make the process groups of a mesh. Collective."""
    mesh = make_mesh(context, shape)
    context.monitor.stage = mesh.stages[0]
    return Launch(mesh=mesh, num_microbatches=num_microbatches)
