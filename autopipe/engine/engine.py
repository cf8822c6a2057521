"""The engine: a batch in, a training step or an evaluation over all stages done, the loss out, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, DistributedSampler

from autopipe.capture import Captured
from autopipe.checkpoint import Reader, newest, open_weights
from autopipe.config import PipelineConfig
from autopipe.engine.failures.monitor import watched
from autopipe.engine.ranks.context import Context
from autopipe.engine.ranks.mesh import mesh_shape, mesh_shape_of_plan
from autopipe.engine.setup.auto_plan import left_to_search, search_plan
from autopipe.engine.setup.place_parameters import place, release
from autopipe.engine.setup.planning import capture_first, compare_ranks, num_microbatches_of, plan_layout
from autopipe.engine.state.async_checkpoint import Saver
from autopipe.engine.state.checkpoint_state import collect, load
from autopipe.engine.state.loss_scale import LossScale
from autopipe.engine.state.master_weights import lower
from autopipe.engine.state.optimizer import ShardedOptimizer
from autopipe.engine.state.parameters import StageParameters, zero_gradient
from autopipe.engine.state.replicas import Replicas
from autopipe.engine.step.batch_shard import BatchShard, shard_batch_of
from autopipe.engine.step.microbatch import Batch, MicroBatch, check_device, split
from autopipe.engine.step.outputs import gather_outputs
from autopipe.engine.step.programs import Kind
from autopipe.engine.step.runner import Runner
from autopipe.engine.training_loop import TrainingLoop
from autopipe.placement import owners, with_unread
from autopipe.plan import Plan
from autopipe.stages import placement


class Engine(TrainingLoop):
    """Trains a model as a pipeline over the processes of the launch; on one process, as one stage.

    Made by `autopipe.pipeline`. The model is captured and planned at the first batch, or at once where an example was given.
    Every rank makes the same calls with the same batch (under `shard_batch=False`, the ranks of one replica do).
    """

    def __init__(self, model: nn.Module, config: PipelineConfig, context: Context) -> None:
        super().__init__(config, context)
        self._model = model
        self._flags = {m: m.training for m in model.modules()}
        self._runner: Runner | None = None
        self._saver = Saver(context)
        self._resume: Reader | None = None
        self.steps = 0
        self._told = mesh_shape(config, context.world_size)
        if not left_to_search(config, context.world_size):
            self._lay_out(self._told, num_microbatches_of(config, self._told.num_stages))

    # -- what users call ----------------------------------------------------------------------------------------------

    @watched
    def train_batch(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """One training step on a whole batch.

        With an optimizer it clears gradients, runs the schedule, clips, and steps optimizer and scheduler; gradients stay
        readable until the next call. Without one, gradients are added to those that are there, as in PyTorch.

        Args:
            args, kwargs: the batch, as the model takes it; tensors whose first dimension is the batch size are split.
            target: goes to `loss_fn(output, target)`; without a `loss_fn` to the model, as an argument of that name.

        Returns:
            The mean loss over the batch, a float32 scalar on the CPU, the same on every rank.

        Raises:
            EngineError: a rank failed; the message is the first rank's, on every rank.
            CaptureError, PartitionError, ConfigError: the model or the call cannot be run.
        """
        microbatches = self._prepared(args, kwargs, target)
        parameters, optimizing, runner = self._placed(), self._optimizer(), self._ready()
        optimizing.zero_grad()
        earlier = parameters.set_aside()
        step, _ = runner.run(
            "train",
            self._training,
            self._share(microbatches),
            self.steps,
            loss_scale=optimizing.loss_factor,
            reduce=self._reduce_tied,
            stage_done=lambda stage: self._reduce_replicas(parameters.of_stage(stage, tied=False)),
        )
        self._reduce_replicas(parameters.tied_here())
        with self.watcher.waiting("summing the gradients of the replicas"):
            self._replicas.finish_reduce()
            self._replicas.share_buffers(parameters.buffers())
        parameters.put_back(earlier)
        with self.watcher.waiting("sharing the loss"):
            loss = runner.share_loss(step)
        self.watcher.enter("the optimizer's step")
        optimizing.step()
        self.steps += 1
        self._measured.add(step, self._layout.stages)
        self.watcher.tell_paces(self._measured.paces(self.plan))
        if step.loss is not None and step.loss.stopping:
            self._context.preemption.save_and_exit()
        return loss

    @watched
    def eval_batch(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """The mean loss of a batch in evaluation mode: forward only, nothing kept. Arguments and result as in `train_batch`."""
        return self._evaluated(args, kwargs, target)[0]

    @watched
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for a batch in evaluation mode, in the model's own structure, on every rank (see `predict_on`).

        Tensors that come in micro-batches are put together along dimension 0, scalars are averaged over the samples. As a first
        call it plans the model, with the loss where the model returns it.
        """
        self._saver.check()
        if self._config.plan is None or self._config.loss_fn is None:
            self.prepare(args, kwargs, None, for_output=True)
        self._require_plan("predict()")
        microbatches = self._split(args, kwargs, None)
        share = self._share(microbatches, weighted=False)
        step, runs = self._forward("predict", share)
        with self.watcher.waiting("sharing the output"):
            outputs = gather_outputs(
                runs, share.microbatches, self._layout, everywhere=self._config.predict_on == "all"
            )
        if outputs is None:
            return None
        captured = self._ready().predicted(step, microbatches)
        return captured.unflatten([o.to(self._context.device) for o in outputs])

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, for an optimizer of your own: `torch.optim.AdamW(engine.parameters())`."""
        return (p for _, p in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under the model's names, frozen ones too."""
        self._require_plan("named_parameters()")
        return iter(self._placed().named_parameters())

    @watched
    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's state under the model's names, on the CPU of every rank. All ranks must call it."""
        self._require_plan("state_dict()")
        self._saver.check()
        return self._placed().state_dict(self._optimizer().masters.of)

    @watched
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads a whole model's state; each rank takes its share."""
        self._require_plan("load_state_dict()")
        self._saver.check()
        self._placed().load_state_dict(state, self._optimizer().masters.of)

    @watched
    def save_checkpoint(
        self,
        directory: str | Path,
        step: int | None = None,
        client_state: Any = None,
        *,
        keep: int | None = None,
        asynchronous: bool = False,
    ) -> Path:
        """Writes the whole run: parameters, optimizer, scheduler, loss scale, random state, plan. All ranks must call it.

        Args:
            directory: on a file system that all ranks share; a folder `step-…` is made in it.
            step: its number; the number of steps so far where it is None.
            client_state: whatever JSON can hold, such as the position in the data.
            keep: whole checkpoints to keep; None keeps all.
            asynchronous: return once the state is copied to the CPU, and write it beside the next steps. The next save, load or
                `close` waits for it.

        Returns:
            The folder of the checkpoint, which is there when it is whole.

        Raises:
            CheckpointError: it could not be written, on every rank; earlier ones stand. Where an asynchronous one could not be,
                the next call of the engine raises it.
        """
        self._require_plan("save_checkpoint()")
        self._optimizer().require_stepped("save_checkpoint()")
        self._saver.wait()
        tensors, meta = collect(
            self._placed(),
            self._optimizer(),
            self.plan,
            self._context,
            self._layout,
            seed=self._ready().seed,
            client_state={"steps": self.steps, "client": client_state},
        )
        number = self.steps if step is None else step
        return self._saver.save(directory, number, tensors, meta, keep=keep, asynchronous=asynchronous)

    @watched
    def load_checkpoint(self, directory: str | Path) -> Any:
        """Reads the newest whole checkpoint of a directory, written with any number of stages and replicas. All ranks must call it.

        Before the first batch it is read when the model is placed. Returns the `client_state` that was saved.

        Raises:
            CheckpointError: there is none, or it does not fit this model.
        """
        self._saver.wait()
        reader = self._context.agree(lambda: Reader(newest(directory)))
        self._context.require_equal(
            str(reader.checkpoint), "checkpoint", "give all ranks the same directory on a file system that they share"
        )
        self._resume = reader
        if self._plan is not None:
            self._load_resumed()
        self.steps, client_state = reader.progress
        return client_state

    def _load_resumed(self) -> None:
        if self._resume is not None:
            reader, self._resume = self._resume, None
            self._context.agree(lambda: load(reader, self._placed(), self._optimizer()))
            self._ready().seed = self._ready().seed if reader.seed is None else reader.seed

    def save_on_sigterm(
        self, directory: str | Path, client_state: Callable[[], Any] | None = None, *, keep: int | None = None
    ) -> None:
        """From now on SIGTERM, on any rank, ends the run well: all ranks finish the step, save a checkpoint, and exit with 0.

        A second one changes nothing. What launches the run must allow for a step and a checkpoint: torchrun waits 30 s.

        Args:
            directory, keep: as for `save_checkpoint`.
            client_state: gives what is saved as such; called inside of `train_batch`, when `steps` counts the step that is done.

        Raises:
            ConfigError: this is not the main thread.
        """

        def save() -> None:
            state = None if client_state is None else client_state()
            self.save_checkpoint(directory, client_state=state, keep=keep)
            self.close()

        self._context.preemption.arm(save)

    def sampler(self, dataset: Dataset[Any], *, shuffle: bool = True, seed: int = 0) -> DistributedSampler[Any]:
        """A sampler that gives each replica a share of its own, the same on all ranks of a replica; for `shard_batch=False`."""
        layout = self._layout
        return DistributedSampler(dataset, layout.data_parallel, layout.replica, shuffle=shuffle, seed=seed)

    def close(self) -> None:
        """Waits for a checkpoint that is being written, leaves the other ranks, and destroys the process groups that the engine has made.

        The engine cannot be used afterwards.
        """
        try:
            if not self.watcher.failed:
                self._saver.wait()
        finally:
            self._transport.close()
            self._context.close()

    def __enter__(self) -> Engine:
        """`with autopipe.pipeline(model) as engine:` closes the engine; an exception inside is told to all ranks."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.watcher.leave(error)
        self.close()

    # -- the first batch ----------------------------------------------------------------------------------------------

    def prepare(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any, *, for_output: bool = False
    ) -> None:
        """Captures, plans, and places the model by a first batch, unless that is done. Collective.

        Args:
            for_output: there is no target, and there may be no loss: what is planned is the way to the output.
        """
        if self._plan is not None:
            return
        self.watcher.enter("capturing and planning")
        config, context, model = self._config, self._context, self._model
        originals = lower(model) if config.precision == "bf16-params" else {}
        given = config.weights
        weights = context.agree(lambda: open_weights(given) if isinstance(given, (str, Path)) else given)
        captured, microbatch, plan = self._planned(self._batch(args, kwargs, target), for_output)
        stage_of = context.agree(lambda: placement(captured, plan))
        compare_ranks(context, captured, plan)
        self._replicas = Replicas(self._layout, plan.zero_stage)
        owned = with_unread(model, owners(captured, stage_of), captured.names)
        seed = context.gather(torch.initial_seed() if config.seed is None else config.seed)[0]
        mine = [n for n, stages in owned.items() if set(stages) & set(self._layout.stages)]
        later = self._resume is not None
        context.agree(
            lambda: place(model, mine, weights=weights, later=later, seed=seed, device=context.device, exact=originals)
        )
        release(model, captured, mine)
        parameters = StageParameters(model, captured.names, owned, context, self._layout)
        parameters.open(self._transport)
        self._runner = Runner(
            model, config, context, self._layout, self._transport, plan, owned, parameters.tie_groups, self._flags, seed
        )
        self._runner.planned = dict(stage_of)
        if captured.loss is not None:
            self._runner.add_program("train", True, microbatch, captured, stage_of)
        scale = LossScale.for_precision(config.precision)
        self._optimizing = context.agree(
            lambda: ShardedOptimizer(config, parameters, self._replicas, self._transport, scale, originals)
        )
        self._parameters, self._plan = parameters, plan
        self._load_resumed()

    def _planned(self, batch: Batch, for_output: bool) -> tuple[Captured, MicroBatch, Plan]:
        """The captured graph, the micro-batch that it is of, and its plan; lays the ranks out where that was left to the planner."""
        config, context = self._config, self._context
        capture = partial(
            capture_first, self._model, config=config, context=context, flags=self._flags, for_output=for_output
        )
        if self._laid is None and not for_output:
            found = search_plan(batch, config, context, capture)
            self._lay_out(mesh_shape_of_plan(found[2], config, context.world_size), found[2].num_microbatches)
            return found
        if self._laid is None:  # a prediction has no step to make short
            self._lay_out(self._told, num_microbatches_of(config, self._told.num_stages))
        return plan_layout(self._split_batch(batch)[0], config, context, self._layout, self._num_microbatches, capture)

    def _ready(self) -> Runner:
        assert self._runner is not None
        return self._runner

    # -- parts of a step ----------------------------------------------------------------------------------------------

    def _batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> Batch:
        if self._config.loss_fn is None and target is not None:
            return args, {**kwargs, "target": target}, None
        return args, kwargs, target

    def _split_batch(self, batch: Batch) -> list[MicroBatch]:
        """The micro-batches of a batch: of all replicas where they share it."""
        replicas = self._layout.data_parallel if self._config.shard_batch else 1
        return split(*batch, self._num_microbatches * replicas)

    def _split(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> list[MicroBatch]:
        microbatches = self._split_batch(self._batch(args, kwargs, target))
        check_device(microbatches[0], self._context.device)
        return microbatches

    def _prepared(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> list[MicroBatch]:
        """The micro-batches of a call, which the model is planned by where it is the first."""
        self._saver.check()
        self.prepare(args, kwargs, target)
        return self._split(args, kwargs, target)

    def _share(self, microbatches: list[MicroBatch], *, weighted: bool = True) -> BatchShard:
        self.watcher.enter("weighing the micro-batches")
        return shard_batch_of(
            microbatches,
            self._config,
            self._layout,
            self._transport,
            most=self._num_microbatches,
            weighted=weighted,
        )

    def _evaluated(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> tuple[Tensor, float]:
        """The mean loss of a batch, and the batch's weight."""
        microbatches = self._prepared(args, kwargs, target)
        share = self._share(microbatches)
        step, _ = self._forward("eval", share)
        return self._ready().share_loss(step), share.total

    def _forward(self, kind: Kind, share: BatchShard) -> Any:
        return self._ready().run(kind, False, share, self.steps, reduce=_nothing, stage_done=_nothing)

    def _reduce_tied(self, group: int) -> None:
        with self.watcher.waiting("summing the gradients of tied parameters"):
            self._placed().reduce_tied(group)

    def _reduce_replicas(self, parameters: list[nn.Parameter]) -> None:
        """Starts summing gradients over the replicas; those that a replica has not used count as zero."""
        if self._replicas.single:
            return
        with self.watcher.waiting("summing the gradients of the replicas"):
            used_anywhere = self._replicas.used_anywhere(parameters)
        used = [p for p, u in zip(parameters, used_anywhere, strict=True) if u]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = zero_gradient(parameter)
        self._replicas.start_reduce(used)


def _nothing(_: int) -> None:
    """Evaluation reduces nothing."""
