"""Checkpoints written during training: the state is copied, and a thread with its own process group writes the copy."""

from __future__ import annotations

import atexit
import dataclasses
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import autopipe.checkpoint as checkpoint
from autopipe.engine.failures.monitor import RankMonitor
from autopipe.engine.ranks.context import Context
from autopipe.errors import ConfigError

_AFTER_AN_EXCEPTION_S = 5.0


class Saver:
    """Writes the checkpoints of a run, at most one at a time. Every rank makes the same calls."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._own: Context | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(
        self,
        directory: str | Path,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        *,
        keep: int | None,
        asynchronous: bool,
    ) -> Path:
        """Write a checkpoint, or start to. The tensors are copied before this returns. Collective.

        Raises:
            CheckpointError: it could not be written. `check` and `wait` raise it for an asynchronous one.
        """
        if not 0 <= step < 10**18:
            raise ConfigError(
                f"step = {step}",
                expected="a whole number from 0 to 10**18",
                where="save_checkpoint()",
                remedy="number the checkpoints by training steps",
            )
        fixed = self._context.agree(lambda: checkpoint.plain(meta, directory))
        if not asynchronous:
            return checkpoint.write(directory, step, tensors, fixed, ranks=_ranks(self._context), keep=keep)
        if self._own is None:  # the training's own group is in use meanwhile
            group = self._context.new_group(backend="gloo") if self._context.control is not None else None
            self._own = dataclasses.replace(self._context, control=group, monitor=RankMonitor(self._context.rank))
            atexit.register(self._at_exit)
        copies = {key: t.detach().to("cpu", copy=True) for key, t in tensors.items()}
        ranks = _ranks(self._own)
        checkpoint.expect_one_process()

        def work() -> None:
            try:
                checkpoint.write(directory, step, copies, fixed, ranks=ranks, keep=keep)
            except Exception as caught:  # noqa: BLE001 (raised again by `wait`, on every rank)
                self._failure = caught

        self._thread = threading.Thread(target=work, name="autopipe checkpoint", daemon=True)
        self._thread.start()
        return checkpoint.published(Path(directory), step)

    def check(self) -> None:
        """Raise on every rank if the checkpoint being written has failed on any. Free if none is. Collective."""
        if self._thread is None:
            return
        running, failed = self._thread.is_alive(), self._failure is not None
        seen = torch.tensor([int(running), int(failed)])
        if self._context.control is not None:
            with self._context.monitor.waiting():
                dist.all_reduce(seen, dist.ReduceOp.MAX, group=self._context.control)
        if seen[1] or not seen[0]:
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written. Collective.

        Raises:
            CheckpointError: it could not be written, on any rank; the one before it is kept.
        """
        if self._thread is None:
            return
        self._thread.join()
        failure, self._thread, self._failure = self._failure, None, None
        self._context.agree(lambda: _raise(failure))

    def _at_exit(self) -> None:
        """Wait in a program that ends without `close`, but not after an exception, for ranks that may hang."""
        if self._thread is not None:
            self._thread.join(_AFTER_AN_EXCEPTION_S if hasattr(sys, "last_value") else None)


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _ranks(context: Context) -> checkpoint.Ranks:
    return checkpoint.Ranks(
        coordinator=context.rank == 0, group=context.control, agree=context.agree, gather=context.gather
    )
