"""Batches from an iterator: all ranks agree on the next step and on the end of the data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from autopipe.engine.ranks.context import Context
from autopipe.engine.step.microbatch import Batch
from autopipe.engine.transport.p2p import Transport
from autopipe.errors import AutopipeError, ConfigError, EngineError

_LOG = logging.getLogger("autopipe.engine")
_FAILED, _ENDED, _READY = 0, 1, 2


def batch_of(item: Any, *, with_target: bool) -> Batch:
    """The batch that an item of an iterator stands for.

    Args:
        item: keyword arguments as a mapping, positional ones as a tuple or list, or a single one.
        with_target: there is a loss function: the last positional, or the keyword `target`, is its target.

    Raises:
        ConfigError: there is no target in it where one is needed.
    """
    if isinstance(item, Mapping):
        kwargs = dict(item)
        if not with_target or "target" in kwargs:
            target = kwargs.pop("target", None)
            return Batch((), kwargs, target)
    elif not with_target:
        return Batch(tuple(item) if isinstance(item, (tuple, list)) else (item,), {}, None)
    elif isinstance(item, (tuple, list)) and len(item) > 1:
        return Batch(tuple(item[:-1]), {}, item[-1])
    got = f"keys {', '.join(map(repr, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
    raise ConfigError(
        f"a batch without a target: {got}",
        expected="(inputs…, target), or a mapping with 'target'",
        where="the data iterator",
        remedy="let it yield the target of loss_fn too, or leave loss_fn out where the model returns its loss",
    )


class DataFeed:
    """Takes batches from iterators, in step with the other ranks.

    Args:
        with_target: there is a loss function, whose target each item holds.
    """

    def __init__(self, context: Context, transport: Transport, *, with_target: bool) -> None:
        self._context, self._transport, self._with_target = context, transport, with_target

    def batches(self, data: Iterable[Any], steps: int | None) -> Iterator[Batch]:
        """Yield the batches of an iterator on the engine's device, as long as every rank has another. Collective.

        If the data of one rank ends, all end; what the others have taken for that step is dropped, with a warning.

        Args:
            steps: batches to give at most; nothing more is taken from `data` then.

        Raises:
            EngineError: taking a batch failed on a rank; on every rank.
        """
        source = iter(data)
        given = 0  # batches
        while steps is None or given < steps:
            batch, code, error = self._next(source)
            bounds = torch.tensor([code, -code])
            self._transport.all_reduce(bounds, dist.ReduceOp.MAX)
            highest, lowest = int(bounds[0]), -int(bounds[1])
            if lowest == _FAILED:
                _raise_first(error, self._context)
            if lowest == _ENDED:
                if highest == _READY:
                    state = "has no more data" if code == _ENDED else "has more data, of which one batch was taken"
                    _LOG.warning(
                        "rank %d %s after %d batches; ranks differ, and all stop", self._context.rank, state, given
                    )
                return
            assert batch is not None
            yield batch
            given += 1

    def _next(self, source: Iterator[Any]) -> tuple[Batch | None, int, Exception | None]:
        """The next batch, or that there is none, or why it could not be taken."""
        self._context.monitor.enter("taking a batch from the data")
        try:
            return batch_of(next(source), with_target=self._with_target).to(self._context.device), _READY, None
        except StopIteration:
            return None, _ENDED, None
        except Exception as caught:  # noqa: BLE001 (raised on every rank)
            return None, _FAILED, caught


def _raise_first(error: Exception | None, context: Context) -> None:
    """The first rank's failure to take a batch, on every rank."""
    named: Exception | None = error
    if error is not None and not isinstance(error, AutopipeError):
        named = EngineError(
            f"{type(error).__name__}: {error}",
            expected="a batch",
            where=f"the data iterator of rank {context.rank}",
            remedy="fix what makes the batches; see the traceback of that rank",
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
