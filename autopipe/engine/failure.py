"""A rank that fails makes all ranks fail, soon, with the first rank's message: the cause is left in the store, connections are closed."""

from __future__ import annotations

import json
import time
from typing import Any

import torch.distributed as dist

from autopipe.engine.context import Context
from autopipe.engine.transport import Transport
from autopipe.errors import EngineError

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
        if lost_connection:
            cause = self._wait_for_cause()
            transport.close()
            if cause is not None:
                return self._error(cause)
            message = f"{message} (a rank has died without a word)"
        first = self._record(message)
        transport.close()
        self._wait_for_readers()
        return self._error(first)

    def _record(self, message: str) -> dict[str, Any]:
        mine = json.dumps({"rank": self._context.rank, "message": message})
        stored: dict[str, Any] = json.loads(self._store.compare_set(_KEY, "", mine))
        return stored

    def _error(self, cause: dict[str, Any]) -> EngineError:
        self._store.add(f"{_KEY}/seen", 1)
        return EngineError(str(cause["message"]), remedy=f"mend the first cause, which is that of rank {cause['rank']}")

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

    def _wait_for_readers(self) -> None:
        """The process that holds the store must not leave before the others have read the cause."""
        deadline = time.monotonic() + _WAIT_FOR_READERS_S
        while time.monotonic() < deadline:
            if self._store.add(f"{_KEY}/seen", 0) >= self._context.world_size - 1:
                return
            time.sleep(0.02)
