"""A rank's connection to the board: says where the rank is, and ends its waiting when a first cause is known.

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
from autopipe.engine.failures.process_state import look
from autopipe.engine.failures.stragglers import RankPhase

_LOG = logging.getLogger("autopipe.engine")
ANSWER_WITHIN_S = 2.0
LEAVE_AFTER_S = 30.0
"""A call that has not raised so long after the first cause is stuck where nothing can wake it: the process is ended."""


class Here(Protocol):
    """This rank, as its watcher knows it."""

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
class BoardHost:
    """The process that holds the board, for those on the same host; `visible` says whether this is one."""

    pid: int
    started: str
    visible: bool


class HeartbeatClient(threading.Thread):
    """The thread that talks with the board.

    Attributes:
        left: the failure that a call would be, because a rank has left.
    """

    def __init__(
        self, watcher: Here, wire: JsonSocket, board: BoardHost, heartbeat_s: float, interrupt: Callable[[], None]
    ) -> None:
        super().__init__(name="autopipe-watcher", daemon=True)
        self.wire = wire
        self.left: Failure | None = None
        self._watcher, self._board, self._heartbeat_s, self._interrupt = watcher, board, heartbeat_s, interrupt
        self._first: Failure | None = None
        self._known = threading.Event()
        self._closing = threading.Event()
        self._warned = False
        self._board_at = RankPhase(stage=0, phase="starting", waiting=False, for_s=0.0, usual_s=None, serial=0)

    def run(self) -> None:
        """Beats, listens, and judges the silence of the board, until closed."""
        heard = last = time.monotonic()
        beat = 0.0
        while not self._closing.is_set():
            readable, _, _ = select.select([self.wire.sock], [], [], beat_every(self._heartbeat_s) / 2)
            now = time.monotonic()
            if readable:
                messages = self.wire.receive()
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
                self.wire.send({"beat": asdict(self._watcher.place())})
            if self._first is None:
                self._judge(now - heard)
        if not self._closing.is_set():
            self._closing.wait()
        self.wire.close()

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
            self.wire.send({"saw": {"rank": rank, "state": look(pid, started)}})

    def _board_gone(self) -> None:
        if self._first is None and self.left is None:
            self._learn(self._of_board(what_was_seen("gone", 0.0)))

    def _judge(self, silent_s: float) -> None:
        state = look(self._board.pid, self._board.started) if self._board.visible and silent_s > 1 else None
        judged = verdict(silent_s, self._heartbeat_s, state)
        if judged not in ("well", "busy"):
            first = self._of_board(what_was_seen(judged, silent_s))
            self.wire.send({"failed": first.to_json()})  # for the board to read, should it ever go on
            self._learn(first)

    def _of_board(self, message: str) -> Failure:
        return Failure(rank=0, stage=self._board_at.stage, phase=self._board_at.phase, message=message)

    def _learn(self, first: Failure) -> None:
        self._first = first
        in_call = self._watcher.heard(first)
        self._known.set()
        self._interrupt()
        if in_call:
            if first.rank != self._watcher.rank:
                _LOG.error("rank %d ends its call: %s", self._watcher.rank, first)
            threading.Thread(target=self._end_stuck_call, args=(first,), name="autopipe-deadline", daemon=True).start()

    def _end_stuck_call(self, first: Failure) -> None:
        deadline = time.monotonic() + LEAVE_AFTER_S
        while time.monotonic() < deadline:
            if not self._watcher.in_call or self._closing.wait(0.5):
                return
        _LOG.critical(
            "rank %d is stuck %.0f s after the first cause and is ended: %s", self._watcher.rank, LEAVE_AFTER_S, first
        )
        os._exit(1)

    # -- what is told -------------------------------------------------------------------------------------------------

    def report(self, mine: Failure) -> Failure:
        """Tells the board of a failure here; returns the first cause, which may be another's."""
        if self._first is not None:
            return self._first
        if self.wire.send({"failed": mine.to_json()}) or mine.secondary:
            patience = max(10 * self._heartbeat_s, 30.0) if mine.secondary else ANSWER_WITHIN_S + SECONDARY_S
            self._known.wait(patience)
        return self._first or (self.left if mine.secondary and self.left else mine)

    def close(self) -> None:
        """Says goodbye and ends the thread."""
        self.wire.send({"bye": 1})
        self._closing.set()
        self.join(1.0)
