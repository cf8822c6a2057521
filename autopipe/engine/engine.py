"""The engine: trains, evaluates and predicts with a model as a pipeline, batch by batch, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, overload

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, DistributedSampler
from tqdm import tqdm

from autopipe.checkpoint import Reader, newest
from autopipe.config import PipelineConfig
from autopipe.engine.data_feed import DataFeed
from autopipe.engine.failures.monitor import RankMonitor, monitored
from autopipe.engine.introspection import report, write_trace
from autopipe.engine.ranks.context import Context
from autopipe.engine.setup.first_batch import Unprepared, unprepared
from autopipe.engine.setup.prepared import Prepared
from autopipe.engine.state.async_checkpoint import Saver
from autopipe.engine.step.microbatch import Batch, batch_size
from autopipe.engine.step.step_stats import Measurements
from autopipe.engine.training_loop import StepLog, evaluate_over, train_over
from autopipe.engine.transport.p2p import Transport
from autopipe.errors import EngineError
from autopipe.plan import Plan


class Engine:
    """Trains a model as a pipeline over the processes of the launch; on one process, as one stage.

    Made by `autopipe.pipeline`. The model is captured and planned at the first batch, or at once if an example was
    given. Every rank makes the same calls with the same batch (under `shard_batch=False`, the ranks of one replica do).

    Attributes:
        steps: training steps that are done.
    """

    def __init__(self, model: nn.Module, config: PipelineConfig, context: Context) -> None:
        self._config, self._context = config, context
        self._transport, self._saver, self._measured = Transport(context), Saver(context), Measurements()
        self._state: Unprepared | Prepared = unprepared(model, config, context, self._transport)
        self._feed = DataFeed(context, self._transport, with_target=config.loss_fn is not None)
        self._training = True
        self.steps = 0

    # -- one batch ----------------------------------------------------------------------------------------------------

    @monitored
    def train_batch(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """One training step on a whole batch.

        With an optimizer it clears gradients, runs the schedule, clips, and steps optimizer and scheduler; gradients
        stay readable until the next call. Without one, gradients are added to those that are there, as in PyTorch.

        Args:
            args, kwargs: the batch, as the model takes it; tensors whose first dimension is the batch size are split.
            target: goes to `loss_fn(output, target)`; without a `loss_fn` to the model, as an argument of that name.

        Returns:
            The mean loss over the batch, a float32 scalar on the CPU, the same on every rank.

        Raises:
            EngineError: a rank failed; the message is the first rank's, on every rank.
            CaptureError, PartitionError, ConfigError: the model or the call cannot be run.
        """
        batch = self._batch(args, kwargs, target)
        prepared = self._prepared_by(batch)
        shard = prepared.shard(prepared.split(batch))
        optimizer = prepared.optimizer
        optimizer.zero_grad()
        with prepared.gradients.one_step():
            step, _ = prepared.runner.run("train", self._training, shard, self.steps, loss_scale=optimizer.loss_factor)
        with self.monitor.waiting("sharing the loss"):
            loss = prepared.runner.share_loss(step)
        self.monitor.enter("the optimizer's step")
        optimizer.step()
        self.steps += 1
        self._measured.add(step, prepared.peers.mesh.stages)
        self.monitor.tell_paces(self._measured.paces(prepared.plan))
        if step.loss is not None and step.loss.stopping:
            self._context.preemption.save_and_exit()
        return loss

    @monitored
    def eval_batch(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """The mean loss of a batch in evaluation mode, forward only. Arguments and result as in `train_batch`."""
        return self._evaluated(self._batch(args, kwargs, target))[0]

    @monitored
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for a batch in evaluation mode, in its own structure, on every rank (see `predict_on`).

        Tensors that come in micro-batches are put together along dimension 0, scalars are averaged over the samples. As
        a first call it plans the model, with the loss if the model returns it.
        """
        self._saver.check()
        batch = Batch(args, kwargs, None)
        if self._config.plan is None or self._config.loss_fn is None:
            self._prepare(batch, for_output=True)
        return self._planned("predict()").predict(batch, self.steps)

    # -- many batches -------------------------------------------------------------------------------------------------

    @overload
    def train(self, data: bool = True) -> Self: ...

    @overload
    def train(
        self,
        data: Iterable[Any],
        steps: int | None = None,
        *,
        log_every: int = 10,
        log: Callable[[str], None] = tqdm.write,
        progress: bool | None = None,
    ) -> list[float]: ...

    def train(
        self,
        data: Iterable[Any] | bool = True,
        steps: int | None = None,
        *,
        log_every: int = 10,
        log: Callable[[str], None] = tqdm.write,
        progress: bool | None = None,
    ) -> Self | list[float]:
        """Train on the batches of `data`; or, as in PyTorch, set the mode by `train()` and `train(False)`.

        Every rank passes its own iterator over the same batches (with `shard_batch=False`, over its replica's).
        Training stops on all ranks once the data of any rank ends. Tensors are moved to the engine's device.

        Args:
            data: yields a mapping of keyword arguments, a tuple of positional ones, or a single one; with a `loss_fn`
                the last of the tuple, or the key `target`, is its target. True or False: set the mode, train nothing.
            steps: how many at most; None: until the data ends.
            log_every: steps between two lines with step, loss (mean since the last line), learning rate, gradient norm,
                samples/s, peak memory and measured bubble; under fp16 also the loss scale. 0: none.
            log: takes each line, on the first rank; `logging.getLogger("mine").info`, say.
            progress: show a bar on the first rank; None: if stderr is a terminal.

        Returns:
            The loss of each step that was done.

        Raises:
            EngineError: an iterator or a rank failed; on every rank.
        """
        if isinstance(data, bool):
            self._training = data
            return self
        line = StepLog(self._context, log, log_every)

        def one(batch: Batch) -> float:
            planned = isinstance(self._state, Prepared)
            loss = float(self.train_batch(*batch.args, target=batch.target, **batch.kwargs))
            line.add(loss, batch_size(*batch), timed=planned)
            line.write_if_due(self.steps, self._planned("train()"), self._measured)
            return loss

        with self.monitor.call():
            batches = self._feed.batches(data, steps)
            return train_over(batches, one, steps=steps, show_bar=progress if self.is_first_rank else False)

    def eval(self) -> Self:
        """Let `train_batch` run the model in evaluation mode."""
        return self.train(False)

    @monitored
    def evaluate(self, data: Iterable[Any], steps: int | None = None) -> float:
        """The mean loss over the batches of `data` in evaluation mode, weighted as one batch. Iterators as in `train`.

        Raises:
            ConfigError: there is no batch.
            EngineError: an iterator or a rank failed; on every rank.
        """
        return evaluate_over(self._feed.batches(data, steps), self._evaluated)

    # -- parameters and checkpoints -----------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, for an optimizer of your own: `torch.optim.AdamW(engine.parameters())`."""
        return (p for _, p in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under the model's names, frozen ones too."""
        return iter(self._planned("named_parameters()").parameters.named_parameters())

    @monitored
    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's state under the model's names, on the CPU of every rank. All ranks must call it."""
        prepared = self._planned("state_dict()")
        self._saver.check()
        return prepared.parameters.state_dict(prepared.optimizer.masters.of)

    @monitored
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a whole model's state; each rank takes its share."""
        prepared = self._planned("load_state_dict()")
        self._saver.check()
        prepared.parameters.load_state_dict(state, prepared.optimizer.masters.of)

    @monitored
    def save_checkpoint(
        self,
        directory: str | Path,
        step: int | None = None,
        client_state: Any = None,
        *,
        keep: int | None = None,
        asynchronous: bool = False,
    ) -> Path:
        """Write the whole run: parameters, optimizer, scheduler, loss scale, random state, plan. On all ranks.

        Args:
            directory: on a file system that all ranks share; a folder `step-…` is made in it.
            step: its number; None: the number of steps so far.
            client_state: anything that JSON can hold, such as the position in the data.
            keep: whole checkpoints to keep; None keeps all.
            asynchronous: return once the state is copied to the CPU, and write it during the next steps. The next save,
                load or `close` waits for it.

        Returns:
            The folder of the checkpoint, which appears once it is whole.

        Raises:
            CheckpointError: it could not be written, on every rank; earlier ones are kept. For an asynchronous one, the
                next call of the engine raises it.
        """
        prepared = self._planned("save_checkpoint()")
        prepared.optimizer.require_stepped("save_checkpoint()")
        self._saver.wait()
        tensors, meta = prepared.collect({"steps": self.steps, "client": client_state})
        number = self.steps if step is None else step
        return self._saver.save(directory, number, tensors, meta, keep=keep, asynchronous=asynchronous)

    @monitored
    def load_checkpoint(self, directory: str | Path) -> Any:
        """Read the newest whole checkpoint of a directory, written by any layout. All ranks must call it.

        Before the first batch, it is read once the model is placed. Returns the `client_state` that was saved.

        Raises:
            CheckpointError: there is none, or it does not fit this model.
        """
        self._saver.wait()
        reader = self._context.agree(lambda: Reader(newest(directory)))
        self._context.require_equal(
            str(reader.checkpoint), "checkpoint", "give all ranks the same directory on a file system that they share"
        )
        if isinstance(self._state, Prepared):
            self._state.load(reader)
        else:
            self._state = self._state.resumed_from(reader)
        self.steps, client_state = reader.progress
        return client_state

    def save_on_sigterm(
        self, directory: str | Path, client_state: Callable[[], Any] | None = None, *, keep: int | None = None
    ) -> None:
        """End the run well on SIGTERM, on any rank: all ranks finish the step, save a checkpoint, and exit with 0.

        A second SIGTERM changes nothing. The launcher must leave time for a step and a checkpoint: torchrun waits 30 s.

        Args:
            directory, keep: as for `save_checkpoint`.
            client_state: returns the state to save; called in `train_batch`, when `steps` counts the step just done.

        Raises:
            ConfigError: this is not the main thread.
        """

        def save() -> None:
            state = None if client_state is None else client_state()
            self.save_checkpoint(directory, client_state=state, keep=keep)
            self.close()

        self._context.preemption.arm(save)

    def sampler(self, dataset: Dataset[Any], *, shuffle: bool = True, seed: int = 0) -> DistributedSampler[Any]:
        """A sampler that gives each replica its own share, the same on all its ranks; for `shard_batch=False`."""
        mesh = self._state.launch.mesh
        return DistributedSampler(dataset, mesh.data_parallel, mesh.replica, shuffle=shuffle, seed=seed)

    # -- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for a checkpoint that is being written, leave the other ranks, and destroy the engine's process groups.

        The engine cannot be used afterwards.
        """
        try:
            if not self.monitor.failed:
                self._saver.wait()
        finally:
            self._transport.close()
            self._context.close()

    def __enter__(self) -> Self:
        """`with autopipe.pipeline(model) as engine:` closes the engine; an exception inside is told to all ranks."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.monitor.leave(error)
        self.close()

    # -- what can be read ---------------------------------------------------------------------------------------------

    @monitored
    def report(self, format: str = "table") -> str:
        """The plan, and with its predictions what the last training steps took, stage by stage. All ranks must call it.

        Args:
            format: `table` (a notebook shows it as HTML), `json`, `csv`, `md` or `html`.
        """
        return report(self._planned("report()"), self._measured, format)

    @monitored
    def trace(self, path: str | Path) -> None:
        """Write the last training step, all actions of all ranks, as a trace for Perfetto. All ranks must call it."""
        write_trace(path, self._context, self._measured)

    @property
    def plan(self) -> Plan:
        """The plan that is run."""
        return self._planned("plan").plan

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """This rank's optimizer; None if none was given, before the first batch, and if nothing here is trained."""
        return self._state.optimizer.optimizer if isinstance(self._state, Prepared) else None

    @property
    def lr_scheduler(self) -> Any:
        """This rank's learning-rate scheduler, or None."""
        return self._state.optimizer.lr_scheduler if isinstance(self._state, Prepared) else None

    @property
    def grad_norm(self) -> float | None:
        """The norm of the last step's gradients over all stages, before clipping; None if nothing is clipped."""
        return self._state.optimizer.grad_norm if isinstance(self._state, Prepared) else None

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped on all ranks because of an fp16 overflow on one."""
        return self._state.optimizer.skipped if isinstance(self._state, Prepared) else 0

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a replica, in a batch that has samples enough."""
        return self._state.launch.num_microbatches

    @property
    def stage(self) -> int:
        """The (first) stage of this rank."""
        return self._state.launch.mesh.stages[0]

    @property
    def is_first_rank(self) -> bool:
        """Whether this is rank 0, which prints and saves for all."""
        return self._context.rank == 0

    @property
    def device(self) -> torch.device:
        """The device of this rank; batches must lie on it."""
        return self._context.device

    @property
    def monitor(self) -> RankMonitor:
        """Tells the other ranks of failures here, and raises theirs."""
        return self._context.monitor

    # -- the two states -----------------------------------------------------------------------------------------------

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> None:
        """Capture, plan, and place the model by a first batch, unless that is done. Collective."""
        self._prepare(self._batch(args, kwargs, target))

    def _prepare(self, batch: Batch, *, for_output: bool = False) -> None:
        if isinstance(self._state, Unprepared):
            self._state = self._state.prepare(batch, for_output=for_output)

    def _prepared_by(self, batch: Batch) -> Prepared:
        """The state for a call with a batch, which the model is planned by if it is the first."""
        self._saver.check()
        self._prepare(batch)
        return self._planned("a batch")

    def _planned(self, what: str) -> Prepared:
        if isinstance(self._state, Prepared):
            return self._state
        raise EngineError(
            f"{what} before the first batch",
            expected="a model that is planned",
            remedy="pass example_args to autopipe.pipeline(), or call train_batch() first",
        )

    def _batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> Batch:
        return Batch(args, kwargs, target).for_model(has_loss_fn=self._config.loss_fn is not None)

    def _evaluated(self, batch: Batch) -> tuple[Tensor, float]:
        """The mean loss of a batch, and the batch's weight."""
        return self._prepared_by(batch).evaluate(batch, self.steps)
