"""The coordinator, a thread on rank 0: every rank's monitor is connected to it; the first failure that it learns of is
told to all.

What it goes by, from the surest on: a rank's own message; the end of its connection without a goodbye, which the kernel
of a killed process sends at once; what its host says of a rank that has been silent; and, where no rank shares that
host, a silence of many heartbeats. A rank that is silent but runs (an operation that holds Python's lock) is warned
about and never blamed.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from autopipe.engine.failures.failure import Failure
from autopipe.engine.failures.json_socket import JsonSocket, Message
from autopipe.engine.failures.process_state import State, process_state
from autopipe.engine.failures.stragglers import Pace, RankPhase, StragglerDetector

_LOG = logging.getLogger("autopipe.engine")
TICK_S = 0.1
LATE_S = 1.0
SECONDARY_S = 1.0
"""So long a lost connection waits for the first cause."""
HELLO_WITHIN_S = 10.0
WITHOUT_EVIDENCE = 10
"""Heartbeats of silence after which a rank is named although nothing can be seen of it."""


def beat_every(heartbeat_s: float) -> float:
    """Seconds between two signs of life."""
    return min(0.5, heartbeat_s / 4) if heartbeat_s > 0 else 0.5


def verdict(silent_s: float, heartbeat_s: float, state: State | None) -> str:
    """State of a rank: `well`, `busy` (silent, but it runs), `stopped`, `gone`, or `silent` (nothing can be
    seen of it)."""
    if heartbeat_s <= 0 or silent_s < heartbeat_s:
        return "well"
    if state is not None:
        return "busy" if state == "running" else state
    return "silent" if silent_s >= WITHOUT_EVIDENCE * heartbeat_s else "well"


def what_was_seen(verdict: str, silent_s: float) -> str:
    """A verdict in words."""
    return {
        "stopped": f"the process is stopped (by a signal or a debugger); it has been silent for {silent_s:.1f} s",
        "gone": "the process has died without a word (killed, or crashed)",
        "silent": f"nothing was heard for {silent_s:.0f} s; its process is stopped, or its machine or network is gone",
    }[verdict]


@dataclass(slots=True)
class Member:
    """A rank as the coordinator knows it.

    Attributes:
        heard_s: when it was last heard.
        seen: what a rank on its host has seen of it during this silence.
        note: an error that it raised and that does not concern the others, unless it leaves.
    """

    rank: int
    connection: JsonSocket
    host: str
    pid: int
    started: str
    heard_s: float
    place: RankPhase | None = None
    paces: list[Pace] = field(default_factory=list)
    note: str = ""
    seen: State | None = None
    asked_s: float = 0.0
    left: bool = False
    warned: bool = False

    def failure(self, message: str) -> Failure:
        """A failure of this rank, at the place where it was last."""
        place = self.place
        return Failure(
            rank=self.rank,
            stage=place.stage if place else None,
            phase=place.phase if place else "starting",
            message=f"{self.note} ({message})" if self.note else message,
        )


class FailureCoordinator(threading.Thread):
    """Collects what the monitors say, and tells all of them the first failure.

    Args:
        token: a monitor that does not know it is not let in.
        heartbeat_s: silence after which a rank is looked at; 0: never.
        host: the address to listen on.
        identity: what `host_identity` says here.
    """

    def __init__(self, token: str, heartbeat_s: float, host: str, identity: str) -> None:
        super().__init__(name="autopipe-coordinator", daemon=True)
        self._token, self._heartbeat_s, self._identity = token, heartbeat_s, identity
        dualstack = host == "" and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dualstack else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, dualstack_ipv6=dualstack, backlog=1024)
        self.port = int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._strangers: dict[JsonSocket, float] = {}
        self._members: dict[int, Member] = {}
        self._slowness = StragglerDetector()
        self._first: Failure | None = None
        self._pending: tuple[Failure, float] | None = None
        self._open = True

    def run(self) -> None:
        """Serves until rank 0 says goodbye."""
        last = beat = time.monotonic()
        while self._open:
            events = self._selector.select(TICK_S)
            now = time.monotonic()
            for key, _ in events:
                if key.data is None:
                    self._accept(now)
                else:
                    self._receive(key.data, now)
            if now - last > LATE_S:  # this process did not run: silence was its own
                for member in self._members.values():
                    member.heard_s = now
            last = now
            self._judge(now)
            if now - beat >= beat_every(self._heartbeat_s):
                beat = now
                self._beat()
                self._warn()
        self._tell({"left": 0})
        self.drop()

    def drop(self) -> None:
        """Closes all connections."""
        self._open = False
        for connection in [*self._strangers, *(m.connection for m in self._members.values())]:
            connection.close()
        self._listener.close()
        self._selector.close()

    # -- connections --------------------------------------------------------------------------------------------------

    def _accept(self, now: float) -> None:
        sock, _ = self._listener.accept()
        sock.settimeout(HELLO_WITHIN_S)
        connection = JsonSocket(sock, self._heartbeat_s)
        self._strangers[connection] = now + HELLO_WITHIN_S
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _receive(self, connection: JsonSocket, now: float) -> None:
        messages = connection.receive()
        member = next((m for m in self._members.values() if m.connection is connection), None)
        for message in messages or ():
            if member is None:
                member = self._admit(connection, message, now)
                if member is None:
                    messages = None
                    break
            else:
                self._hear(member, message, now)
        if messages is None:
            self._forget(connection)
            if member is not None and not member.left:
                member.left = True
                self._settle(member.failure(what_was_seen("gone", 0.0)))

    def _admit(self, connection: JsonSocket, message: Message, now: float) -> Member | None:
        hello = message.get("hello")
        if not isinstance(hello, dict) or hello.get("token") != self._token or hello["rank"] in self._members:
            return None
        del self._strangers[connection]
        member = Member(hello["rank"], connection, hello["host"], hello["pid"], hello["started"], now)
        self._members[member.rank] = member
        connection.send({"welcome": 1})
        return member

    def _forget(self, connection: JsonSocket) -> None:
        self._strangers.pop(connection, None)
        self._selector.unregister(connection.sock)
        connection.close()

    def _beat(self) -> None:
        """A sign of life, with the place of rank 0, which nobody could ask for if it were stopped."""
        here = self._members.get(0)
        self._tell({"beat": asdict(here.place)} if here is not None and here.place is not None else {})

    def _tell(self, message: Message) -> None:
        """To rank 0 last: what it hears may end its process, and this coordinator with it."""
        for member in sorted(self._members.values(), key=lambda m: m.rank == 0):
            if not member.left:
                member.connection.send(message)

    # -- messages -----------------------------------------------------------------------------------------------------

    def _hear(self, member: Member, message: Message, now: float) -> None:
        member.heard_s, member.seen, member.warned = now, None, False
        for kind, value in message.items():
            match kind:
                case "beat":
                    member.place = RankPhase(**value)
                case "pace":
                    member.paces = [Pace(**p) for p in value]
                    self._warn_of_paces(member)
                case "note":
                    member.note = str(value)
                case "failed":
                    self._report(Failure(**value), now)
                case "saw":
                    self._saw(value)
                case "bye":
                    self._leave(member)

    def _saw(self, value: dict[str, Any]) -> None:
        other = self._members.get(value["rank"])
        if other is not None:
            other.seen = value["state"]

    def _leave(self, member: Member) -> None:
        member.left = True
        if member.rank == 0:
            self._open = False
            return
        self._tell({"left": member.rank, "note": member.note})

    # -- causes -------------------------------------------------------------------------------------------------------

    def _report(self, failure: Failure, now: float) -> None:
        if not failure.secondary:
            self._settle(failure)
        elif self._pending is None:
            self._pending = failure, now + SECONDARY_S

    def _settle(self, failure: Failure) -> None:
        if self._first is None:
            self._first = failure
            self._tell({"cause": failure.to_json()})

    def _judge(self, now: float) -> None:
        for connection in [w for w, deadline in self._strangers.items() if now > deadline]:
            self._forget(connection)
        if self._first is not None:
            return
        for member in self._members.values():
            if not member.left:
                self._judge_silence(member, now)
        if self._pending is not None and now >= self._pending[1]:
            self._settle(self._blamed(self._pending[0]))

    def _judge_silence(self, member: Member, now: float) -> None:
        silent_s = now - member.heard_s
        if self._heartbeat_s <= 0 or silent_s < self._heartbeat_s:
            return
        if member.host == self._identity:
            member.seen = process_state(member.pid, member.started)
        elif now - member.asked_s > beat_every(self._heartbeat_s):
            member.asked_s = now
            for other in self._members.values():
                if other.host == member.host and other is not member:
                    other.connection.send({"look": [member.rank, member.pid, member.started]})
        judged = verdict(silent_s, self._heartbeat_s, member.seen)
        if judged == "busy" and not member.warned:
            member.warned = True
            phase = member.place.phase if member.place else "starting"
            _LOG.warning(
                "rank %d has been silent for %.0f s in %s, but its process runs: an operation holds Python's lock, "
                "or the machine "
                "is overloaded",
                member.rank,
                silent_s,
                phase,
            )
        if judged not in ("well", "busy"):
            self._settle(member.failure(what_was_seen(judged, silent_s)))

    def _blamed(self, lost: Failure) -> Failure:
        """The cause of a lost connection of which no rank has said why."""
        for member in self._members.values():
            if member.left:
                return member.failure("it has left, its engine closed or its script ended, while other ranks went on")
        return Failure(**(lost.to_json() | {"message": f"{lost.message} (no rank has said why)", "secondary": False}))

    # -- slow ranks ---------------------------------------------------------------------------------------------------

    def _warn(self) -> None:
        places = {m.rank: m.place for m in self._members.values() if m.place is not None and not m.left}
        for text in self._slowness.of_places(places):
            _LOG.warning(text)

    def _warn_of_paces(self, member: Member) -> None:
        if member.rank != max(self._members):
            return  # once a round, when the last rank has said its own
        paces = [(m.rank, p) for m in self._members.values() for p in m.paces]
        for text in self._slowness.of_paces(paces):
            _LOG.warning(text)
