"""A rank that fails makes all ranks fail, soon, with the first rank's message: the cause is left in the store, connections are closed."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import torch.distributed as dist

from autopipe.engine.context import Context
from autopipe.engine.transport import Transport
from autopipe.errors import AutopipeError, EngineError

_KEY = "autopipe/first_failure"
_WAIT_FOR_CAUSE_S = 3.0
_WAIT_FOR_READERS_S = 3.0


class FailureBoard:
    """The first failure of a run, in the store that all ranks share; the first writer wins."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._store: Any = dist.distributed_c10d._get_default_store() if context.control is not None else None

    def fail(self, message: str, *, lost_connection: bool, transport: Transport) -> EngineError:
        """Records a failure of this rank and closes its connections, so that the others notice; returns the error to raise.

        Where this rank has only lost a connection, the cause is another rank's: it is waited for, and named.
        """
        if self._store is None:
            return EngineError(message, remedy="see the error above")
        cause = self._wait_for_cause() if lost_connection else self._record(message)
        transport.close()
        if cause is None:
            cause = self._record(f"{message} (a rank has died without a word)")
        self._let_others_read()
        return EngineError(str(cause["message"]), remedy=f"mend the first cause, which is that of rank {cause['rank']}")

    def _record(self, message: str) -> dict[str, Any]:
        """Leaves the message as the first cause, unless there is one; returns the first."""
        mine = {"rank": self._context.rank, "message": message}
        try:
            stored: dict[str, Any] = json.loads(self._store.compare_set(_KEY, "", json.dumps(mine)))
        except RuntimeError:
            return mine  # the process that held the store is gone
        return stored

    def _wait_for_cause(self) -> dict[str, Any] | None:
        deadline = time.monotonic() + _WAIT_FOR_CAUSE_S
        while time.monotonic() < deadline:
            try:
                if self._store.check([_KEY]):
                    cause: dict[str, Any] = json.loads(self._store.get(_KEY))
                    return cause
            except RuntimeError:
                return None  # the process that held the store is gone
            time.sleep(0.02)
        return None

    def _let_others_read(self) -> None:
        """The process that holds the store must not leave before the others have read the cause."""
        deadline = time.monotonic() + _WAIT_FOR_READERS_S
        with contextlib.suppress(RuntimeError):  # gone already: then nobody needs to wait
            seen = self._store.add(f"{_KEY}/seen", 1)
            while self._context.rank == 0 and seen < self._context.world_size and time.monotonic() < deadline:
                time.sleep(0.02)
                seen = self._store.add(f"{_KEY}/seen", 0)


def is_connection_error(cause: BaseException) -> bool:
    """Whether a rank has only noticed that another is gone."""
    if isinstance(cause, AutopipeError) or not isinstance(cause, (RuntimeError, ConnectionError, OSError)):
        return False
    text = str(cause)
    return any(w in text for w in ("Connection closed", "Connection reset", "gloo", "NCCL", "Broken pipe", "Socket"))
