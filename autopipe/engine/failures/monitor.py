"""The monitor of a rank: tracks what this rank is doing, tells the others of its failure, and raises theirs here.

Its thread (`heartbeat.py`) keeps a connection to the coordinator (`coordinator.py`) on rank 0.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar, cast

from autopipe.engine.failures.coordinator import FailureCoordinator
from autopipe.engine.failures.failure import BETWEEN_STEPS, Failure, described, is_connection_error, phase_of
from autopipe.engine.failures.heartbeat import CoordinatorHost, HeartbeatClient
from autopipe.engine.failures.json_socket import JsonSocket
from autopipe.engine.failures.stragglers import Pace, RankPhase
from autopipe.errors import AutopipeError, EngineError
from autopipe.schedule import Action

Method = TypeVar("Method", bound=Callable[..., Any])
KEPT_DURATIONS, TOLD_FROM = 32, 3


class RankMonitor:
    """Tracks the phase of this rank, and the first failure of any. With one process there is nobody to tell.

    Attributes:
        stage: the (first) stage of this rank, once it is known.
        closed: goodbye was said.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.stage: int | None = None
        self.closed = False
        self._client: HeartbeatClient | None = None
        self._coordinator: FailureCoordinator | None = None
        self._what: tuple[Action | str, bool, float, int] = ("starting", False, time.monotonic(), 0)
        self._spent_s = 0.0
        self._durations: dict[Any, deque[float]] = {}
        self._first: Failure | None = None
        self._depth = 0
        self._noted = False

    def connect(
        self,
        connection: JsonSocket,
        host: CoordinatorHost,
        coordinator: FailureCoordinator | None,
        heartbeat_s: float,
        interrupt: Callable[[], None],
    ) -> None:
        """Starts watching over a connection that the coordinator has welcomed.

        Args:
            coordinator: the coordinator itself, on rank 0.
            interrupt: wakes what waits for other ranks, from any thread.
        """
        self._client, self._coordinator = HeartbeatClient(self, connection, host, heartbeat_s, interrupt), coordinator
        self._client.start()

    # -- where this rank is -------------------------------------------------------------------------------------------

    def enter(self, what: Action | str, waiting: bool = False) -> None:
        """From now on this rank is at `what`, or waits for another rank there.

        Raises:
            EngineError: another rank has failed meanwhile.
        """
        if self._first is not None and self._depth:
            raise self._first.error()
        self._move(what, waiting)

    def _move(self, what: Action | str, waiting: bool) -> None:
        before, waited, since, serial = self._what
        now = time.monotonic()
        self._spent_s += 0.0 if waited else now - since
        if what is not before:  # its waits are over too: so long it took of its own
            key = (before.kind, before.stage) if isinstance(before, Action) else before
            if key not in self._durations:
                self._durations[key] = deque(maxlen=KEPT_DURATIONS)
            self._durations[key].append(self._spent_s)
            self._spent_s = 0.0
        self._what = what, waiting, now, serial + 1

    @contextlib.contextmanager
    def waiting(self, what: str | None = None) -> Iterator[None]:
        """Around what waits for other ranks; a part of the present phase where it has no name of its own."""
        before = self._what[0]
        self.enter(before if what is None else what, waiting=True)
        yield
        self.enter(before)

    def place(self) -> RankPhase:
        """The present phase of this rank."""
        what, waiting, since, serial = self._what
        key = (what.kind, what.stage) if isinstance(what, Action) else what
        durations = list(self._durations.get(key, ()))
        return RankPhase(
            stage=what.stage if isinstance(what, Action) else self.stage,
            phase=phase_of(what) if isinstance(what, Action) else what,
            waiting=waiting,
            for_s=time.monotonic() - since,
            usual_s=statistics.median(durations) if len(durations) >= TOLD_FROM else None,
            serial=serial,
        )

    def tell_paces(self, paces: Sequence[Pace]) -> None:
        """Tells the coordinator how fast this rank's stages are, against their plan; nothing where that is not due."""
        if paces and self._client is not None:
            self._client.connection.send({"pace": [asdict(p) for p in paces]})

    # -- failures -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around everything that users call: what goes wrong inside is told to all ranks, and what went wrong elsewhere
        is raised.

        Errors of autopipe that name a mistake pass as they are, since every rank raises them.

        Raises:
            EngineError: this rank or another has failed; the engine cannot be used afterwards.
        """
        if self._depth:
            yield
            return
        self.check()
        self._depth += 1
        self.enter("preparing the call")
        self._note("")
        try:
            yield
        except AutopipeError as error:
            if self._first is None:
                self._note(str(error))
            raise
        except Exception as cause:
            raise self.fail(cause) from cause
        finally:
            self._depth -= 1
            self._move(BETWEEN_STEPS, False)

    def check(self) -> None:
        """Raises the first cause where there is one, or names a rank that has left."""
        if self._first is None and self._client is not None and self._client.left is not None:
            self._first = self._client.left
        if self._first is not None:
            raise self._first.error()

    def fail(self, cause: BaseException, *, stage: int | None = None, phase: str | None = None) -> EngineError:
        """Tells all ranks of a failure here; returns the error to raise, which is that of the first cause."""
        place = self.place()
        mine = Failure(
            rank=self.rank,
            stage=place.stage if stage is None else stage,
            phase=place.phase if phase is None else phase,
            message=described(cause),
            secondary=is_connection_error(cause),
        )
        self._first = self._first or (mine if self._client is None else self._client.report(mine))
        return self._first.error()

    def leave(self, cause: BaseException) -> None:
        """Tells all ranks that an exception ends the script, unless they know of a failure already.

        Errors of autopipe were raised on all ranks; where one was not, the coordinator has a note of it, and the rank
        that leaves is named with it.
        """
        known = self._first is not None or isinstance(cause, AutopipeError)
        if not known and self._client is not None and not self.closed:
            self.fail(cause)

    def close(self) -> None:
        """Says goodbye; what happens to other ranks is no concern any more."""
        if self._client is not None and not self.closed:
            self.closed = True
            self._client.close()
            if self._coordinator is not None:
                self._coordinator.join(1.0)

    def drop(self) -> None:
        """Closes the connections without a goodbye: in a forked process, whose parent goes on with them."""
        self.closed = True
        if self._client is not None:
            self._client.connection.close()
        if self._coordinator is not None:
            self._coordinator.drop()

    def heard(self, first: Failure) -> bool:
        """Takes note of the first cause, from the monitor's thread; true where a call is going on that has to end."""
        if self._first is None:
            self._first = first
        return self._depth > 0

    @property
    def failed(self) -> bool:
        """Whether a first cause is known."""
        return self._first is not None

    @property
    def in_call(self) -> bool:
        """Whether this rank is inside of a call of the engine."""
        return self._depth > 0

    def _note(self, text: str) -> None:
        if self._client is not None and (text or self._noted):
            self._client.connection.send({"note": text})
            self._noted = bool(text)


def monitored(method: Method) -> Method:
    """A method that users call, inside of `RankMonitor.call` of `self.monitor`."""

    @functools.wraps(method)
    def inside(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.monitor.call():
            return method(self, *args, **kwargs)

    return cast(Method, inside)
