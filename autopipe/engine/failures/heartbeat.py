"""A rank's connection to the coordinator: says where the rank is, and ends its waiting when a first cause is known.

What waits for another rank is woken by ending this rank's connections; the call that waits then raises the first cause.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

from autopipe.engine.failures.coordinator import LATE_S, SECONDARY_S, beat_every, verdict, what_was_seen
from autopipe.engine.failures.failure import BETWEEN_STEPS, Failure
from autopipe.engine.failures.json_socket import JsonSocket, Message
from autopipe.engine.failures.process_state import process_state
from autopipe.engine.failures.stragglers import RankPhase

_LOG = logging.getLogger("autopipe.engine")
ANSWER_WITHIN_S = 2.0
LEAVE_AFTER_S = 30.0
"""A call that has not raised so long after the first cause is stuck where nothing can wake it: the process is ended."""


class Here(Protocol):
    """This rank, as its monitor knows it."""

    rank: int

    @property
    def in_call(self) -> bool:
        """Whether this rank is inside of a call of the engine."""
        ...

    def place(self) -> RankPhase:
        """The present phase of this rank."""
        ...

    def heard(self, first: Failure) -> bool:
        """Takes note of the first cause; true where a call is going on that has to end."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorHost:
    """The process that holds the coordinator, for those on the same host; `visible` says whether this is one."""

    pid: int
    started: str
    visible: bool


class HeartbeatClient(threading.Thread):
    """The thread that talks with the coordinator.

    Attributes:
        left: the failure that a call would be, because a rank has left.
    """

    def __init__(
        self,
        monitor: Here,
        connection: JsonSocket,
        coordinator: CoordinatorHost,
        heartbeat_s: float,
        interrupt: Callable[[], None],
    ) -> None:
        super().__init__(name="autopipe-heartbeat", daemon=True)
        self.connection = connection
        self.left: Failure | None = None
        self._monitor, self._coordinator, self._heartbeat_s, self._interrupt = (
            monitor,
            coordinator,
            heartbeat_s,
            interrupt,
        )
        self._first: Failure | None = None
        self._known = threading.Event()
        self._closing = threading.Event()
        self._warned = False
        self._board_at = RankPhase(stage=0, phase="starting", waiting=False, for_s=0.0, usual_s=None, serial=0)

    def run(self) -> None:
        """Beats, listens, and judges the silence of the coordinator, until closed."""
        heard = last = time.monotonic()
        beat = 0.0
        while not self._closing.is_set():
            readable, _, _ = select.select([self.connection.sock], [], [], beat_every(self._heartbeat_s) / 2)
            now = time.monotonic()
            if readable:
                messages = self.connection.receive()
                for message in messages or ():
                    self._hear(message)
                if messages is None:
                    self._board_gone()
                    break
                heard, self._warned = now, False
            if now - last > LATE_S:
                heard = now
            last = now
            if now - beat >= beat_every(self._heartbeat_s):
                beat = now
                self.connection.send({"beat": asdict(self._monitor.place())})
            if self._first is None:
                self._judge(now - heard)
        if not self._closing.is_set():
            self._closing.wait()
        self.connection.close()

    # -- what is heard ------------------------------------------------------------------------------------------------

    def _hear(self, message: Message) -> None:
        if "cause" in message:
            self._learn(Failure(**message["cause"]))
        elif "left" in message:
            note = message.get("note")
            self.left = Failure(
                rank=message["left"],
                stage=None,
                phase=BETWEEN_STEPS,
                message=f"{note + ' ' if note else ''}it has left, its engine closed or its script ended, while "
                "other ranks went on",
            )
        elif "beat" in message:
            self._board_at = RankPhase(**message["beat"])
        elif "look" in message:
            rank, pid, started = message["look"]
            self.connection.send({"saw": {"rank": rank, "state": process_state(pid, started)}})

    def _board_gone(self) -> None:
        if self._first is None and self.left is None:
            self._learn(self._of_board(what_was_seen("gone", 0.0)))

    def _judge(self, silent_s: float) -> None:
        state = (
            process_state(self._coordinator.pid, self._coordinator.started)
            if self._coordinator.visible and silent_s > 1
            else None
        )
        judged = verdict(silent_s, self._heartbeat_s, state)
        if judged not in ("well", "busy"):
            first = self._of_board(what_was_seen(judged, silent_s))
            self.connection.send({"failed": first.to_json()})  # for the coordinator to read, should it ever go on
            self._learn(first)

    def _of_board(self, message: str) -> Failure:
        return Failure(rank=0, stage=self._board_at.stage, phase=self._board_at.phase, message=message)

    def _learn(self, first: Failure) -> None:
        self._first = first
        in_call = self._monitor.heard(first)
        self._known.set()
        self._interrupt()
        if in_call:
            if first.rank != self._monitor.rank:
                _LOG.error("rank %d ends its call: %s", self._monitor.rank, first)
            threading.Thread(target=self._end_stuck_call, args=(first,), name="autopipe-deadline", daemon=True).start()

    def _end_stuck_call(self, first: Failure) -> None:
        deadline = time.monotonic() + LEAVE_AFTER_S
        while time.monotonic() < deadline:
            if not self._monitor.in_call or self._closing.wait(0.5):
                return
        _LOG.critical(
            "rank %d is stuck %.0f s after the first cause and is ended: %s", self._monitor.rank, LEAVE_AFTER_S, first
        )
        os._exit(1)

    # -- what is told -------------------------------------------------------------------------------------------------

    def report(self, mine: Failure) -> Failure:
        """Tells the coordinator of a failure here; returns the first cause, which may be another's."""
        if self._first is not None:
            return self._first
        if self.connection.send({"failed": mine.to_json()}) or mine.secondary:
            patience = max(10 * self._heartbeat_s, 30.0) if mine.secondary else ANSWER_WITHIN_S + SECONDARY_S
            self._known.wait(patience)
        return self._first or (self.left if mine.secondary and self.left else mine)

    def close(self) -> None:
        """Says goodbye and ends the thread."""
        self.connection.send({"bye": 1})
        self._closing.set()
        self.join(1.0)
