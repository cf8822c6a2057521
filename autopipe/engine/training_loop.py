"""The engine's iterator front end: training and evaluation over the batches of an iterator, in terms of one batch at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self, overload

import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from autopipe.engine.failures.monitor import watched
from autopipe.engine.introspection import EngineState
from autopipe.engine.loop import Call, Progress, agreed_calls, no_data
from autopipe.engine.step.microbatch import batch_size
from autopipe.engine.step.step_stats import merge_timelines


class TrainingLoop(EngineState, ABC):
    """`train` and `evaluate` over an iterator, and the mode that they train in."""

    _training = True
    steps: int

    @abstractmethod
    def train_batch(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """One training step on a whole batch."""

    @abstractmethod
    def _evaluated(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> tuple[Tensor, float]:
        """The mean loss of a batch, and the batch's weight."""

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
        """Trains on the batches of `data`; or, as in PyTorch, `train()` and `train(False)` set the mode that `train_batch` uses.

        Every rank passes its own iterator over the same batches (with `shard_batch=False`, over its replica's). Training stops
        where the data of any rank ends, on all ranks alike. Tensors are moved to the engine's device.

        Args:
            data: yields a mapping of keyword arguments, or a tuple of positional ones, or one of them; with a `loss_fn` the last of
                the tuple, or the key `target`, is its target. True or False: no training, the mode only.
            steps: how many at most; None: until the data ends.
            log_every: steps between two lines with step, loss (mean since the last line), learning rate, gradient norm, samples/s,
                peak memory and measured bubble; under fp16 also the loss scale. 0: none.
            log: takes each line, on the first rank; `logging.getLogger("mine").info`, say.
            progress: a bar on the first rank; None: where stderr is a terminal.

        Returns:
            The loss of each step that was done.

        Raises:
            EngineError: an iterator or a rank failed; on every rank.
        """
        if isinstance(data, bool):
            self._training = data
            return self
        with self.watcher.call():
            return self._train(data, steps, log_every, log, progress)

    def _train(
        self,
        data: Iterable[Any],
        steps: int | None,
        log_every: int,
        log: Callable[[str], None],
        progress: bool | None,
    ) -> list[float]:
        said, losses = Progress(self._context, log), list[float]()
        hidden = not self.is_first_rank or (None if progress is None else not progress)
        with tqdm(total=steps, unit="step", disable=hidden) as bar:
            for call in self._calls(data, steps):
                planned = self._plan is not None
                losses.append(float(self.train_batch(*call.args, target=call.target, **call.kwargs)))
                said.add(losses[-1], batch_size(call.args, call.kwargs, call.target))
                if not planned:
                    said.skip_time()
                bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                bar.update()
                if log_every and self.steps % log_every == 0:
                    self._say(said)
        return losses

    @watched
    def evaluate(self, data: Iterable[Any], steps: int | None = None) -> float:
        """The mean loss over the batches of `data` in evaluation mode, weighted as one batch would be. Iterators as in `train`.

        Raises:
            ConfigError: there is no batch.
            EngineError: an iterator or a rank failed; on every rank.
        """
        total = weight = 0.0
        for call in self._calls(data, steps):
            loss, counted = self._evaluated(call.args, call.kwargs, call.target)
            total, weight = total + float(loss) * counted, weight + counted
        if not weight:
            raise no_data()
        return total / weight

    def eval(self) -> Self:
        """Lets `train_batch` run the model in evaluation mode."""
        return self.train(False)

    def _calls(self, data: Iterable[Any], steps: int | None) -> Iterator[Call]:
        with_target = self._config.loss_fn is not None
        return agreed_calls(data, steps, self._context, with_target=with_target, agree=self._to_maximum)

    def _to_maximum(self, values: Tensor) -> None:
        self._transport.all_reduce(values, dist.ReduceOp.MAX)

    def _say(self, said: Progress) -> None:
        """A line about the steps since the last one. Collective."""
        replicas = self._layout.shape.replicas
        counted = [0] if self._config.shard_batch else [ranks[0] for ranks in replicas]
        norm = self.grad_norm if self._config.max_grad_norm is not None else self._placed().norm()
        timeline = merge_timelines(self._context.gather(self._measured.last_step()))
        bubble = timeline.mean_bubble if timeline.events else None
        said.say(self.steps, self._optimizer(), norm=norm, bubble=bubble, counted_ranks=counted)
