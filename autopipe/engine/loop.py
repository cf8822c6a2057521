"""Batches from an iterator: all ranks agree on the next step and on the end of the data; the first rank says how training goes."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopipe.engine.ranks.context import Context
from autopipe.engine.state.optimizer import ShardedOptimizer
from autopipe.errors import AutopipeError, ConfigError, EngineError

_LOG = logging.getLogger("autopipe.engine")
_FAILED, _ENDED, _READY = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """How the engine is called with one batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Any

    def to(self, device: torch.device) -> Call:
        """The call with all of its tensors on a device."""
        parts = (self.args, dict(self.kwargs), self.target)
        args, kwargs, target = pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, parts)
        return Call(args=args, kwargs=kwargs, target=target)


def call_of(item: Any, *, with_target: bool) -> Call:
    """What an iterator yields, as a call.

    Args:
        item: keyword arguments as a mapping, positional ones as a tuple or list, or a single one.
        with_target: there is a loss function: the last positional, or the keyword `target`, is its target.

    Raises:
        ConfigError: there is no target in it where one is needed.
    """
    if isinstance(item, Mapping):
        kwargs = dict(item)
        if not with_target or "target" in kwargs:
            return Call(args=(), kwargs=kwargs, target=kwargs.pop("target", None))
    elif not with_target:
        return Call(args=tuple(item) if isinstance(item, (tuple, list)) else (item,), kwargs={}, target=None)
    elif isinstance(item, (tuple, list)) and len(item) > 1:
        return Call(args=tuple(item[:-1]), kwargs={}, target=item[-1])
    got = f"keys {', '.join(map(repr, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
    raise ConfigError(
        f"a batch without a target: {got}",
        expected="(inputs…, target), or a mapping with 'target'",
        where="the data iterator",
        remedy="let it yield the target of loss_fn too, or leave loss_fn out where the model returns its loss",
    )


def agreed_calls(
    data: Iterable[Any], steps: int | None, context: Context, *, with_target: bool, agree: Callable[[Tensor], None]
) -> Iterator[Call]:
    """The calls of an iterator on this rank, on the engine's device, as long as every rank has another. Collective.

    Where the data of one rank ends, all end; what the others have taken for that step is dropped, with a warning.

    Args:
        steps: calls to give at most; nothing more is taken from `data` then.
        agree: an all-reduce to the maximum over all ranks.

    Raises:
        EngineError: taking a batch failed on a rank; on every rank.
    """
    source = iter(data)
    given = 0  # batches
    while steps is None or given < steps:
        call, code, error = None, _READY, None
        context.watcher.enter("taking a batch from the data")
        try:
            call = call_of(next(source), with_target=with_target).to(context.device)
        except StopIteration:
            code = _ENDED
        except Exception as caught:  # noqa: BLE001 (raised on every rank, below)
            code, error = _FAILED, caught
        bounds = torch.tensor([code, -code])
        agree(bounds)
        highest, lowest = int(bounds[0]), -int(bounds[1])
        if lowest == _FAILED:
            _raise_first(error, context)
        if lowest == _ENDED:
            if highest == _READY:
                state = "has no more data" if code == _ENDED else "has more data, of which one batch was taken"
                _LOG.warning("rank %d %s after %d batches; ranks differ, and all stop", context.rank, state, given)
            return
        assert call is not None
        yield call
        given += 1


def _raise_first(error: Exception | None, context: Context) -> None:
    """The first rank's failure to take a batch, on every rank."""
    named: Exception | None = error
    if error is not None and not isinstance(error, AutopipeError):
        named = EngineError(
            f"{type(error).__name__}: {error}",
            expected="a batch",
            where=f"the data iterator of rank {context.rank}",
            remedy="mend what makes the batches; see the traceback of that rank",
        )
    raise next(e for e in context.gather(named) if e is not None) from error


def no_data() -> ConfigError:
    """The error for an evaluation over nothing."""
    return ConfigError(
        "no batch",
        expected="at least one",
        where="the data iterator",
        remedy="pass a loader, or a new iterator where the last one has ended",
    )


@dataclass(slots=True)
class Progress:
    """What is said every few steps; kept on every rank, since the parts of it lie on different ones.

    Attributes:
        log: takes the lines, on the first rank.
        samples, num_losses, loss_sum, started: of the steps since the last line, and when they began.
    """

    context: Context
    log: Callable[[str], None]
    samples: int = 0
    num_losses: int = 0
    loss_sum: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def restart(self) -> None:
        """Begins a new interval."""
        self.samples, self.num_losses, self.loss_sum, self.started = 0, 0, 0.0, time.perf_counter()

    def skip_time(self) -> None:
        """What was done so far took time that steps do not take: capturing and planning."""
        self.samples, self.started = 0, time.perf_counter()

    def add(self, loss: float, samples: int) -> None:
        """A step is done."""
        self.loss_sum, self.num_losses, self.samples = self.loss_sum + loss, self.num_losses + 1, self.samples + samples

    def say(
        self,
        step: int,
        optimizing: ShardedOptimizer,
        *,
        norm: float | None,
        bubble: float | None,
        counted_ranks: list[int],
    ) -> None:
        """One line on the first rank, from all. Collective.

        Args:
            counted_ranks: those whose samples are a batch of their own.
        """
        optimizer = optimizing.optimizer
        rate = None if optimizer is None else float(optimizer.param_groups[0]["lr"])
        ranks = self.context.gather((rate, self.samples, _peak_bytes(self.context.device)))
        seconds = time.perf_counter() - self.started
        parts = [f"step {step}: loss {self.loss_sum / max(1, self.num_losses):.4f}"]
        rate = next((r for r, _, _ in ranks if r is not None), None)
        parts += [] if rate is None else [f"lr {rate:.3g}"]
        parts += [] if norm is None else [f"gradient norm {norm:.3g}"]
        if optimizing.scale.growth_interval:
            parts += [f"loss scale {optimizing.scale.scale:g}", f"skipped {optimizing.skipped}"]
        parts += [f"{sum(ranks[r][1] for r in counted_ranks) / seconds:.1f} samples/s"]
        parts += [f"peak {max(p for _, _, p in ranks) / 2**30:.2f} GiB"]
        parts += [] if bubble is None else [f"bubble {bubble:.1%}"]
        if self.context.rank == 0:
            self.log(", ".join(parts))
        self.restart()


def _peak_bytes(device: torch.device) -> int:
    """The most memory that was allocated on the device; of the process, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
