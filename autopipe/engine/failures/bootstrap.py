"""Starts the monitors of a run and its coordinator, and sees that no rank leaves them without a word: exceptions,
exits, forks."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from autopipe.engine.failures.coordinator import HELLO_WITHIN_S, FailureCoordinator
from autopipe.engine.failures.heartbeat import CoordinatorHost
from autopipe.engine.failures.json_socket import JsonSocket
from autopipe.engine.failures.monitor import RankMonitor
from autopipe.engine.failures.process_state import host_identity, started_at
from autopipe.errors import ConfigError, EngineError

HEARTBEAT_VARIABLE = "AUTOPIPE_HEARTBEAT_S"
DEFAULT_HEARTBEAT_S = 10.0
_UNUSED_TAG = 2**30


def heartbeat_s() -> float:
    """Seconds of silence after which a rank is looked at: `AUTOPIPE_HEARTBEAT_S`, 10 where it is not set, 0 for never.

    Raises:
        ConfigError: it is no number of seconds.
    """
    given = os.environ.get(HEARTBEAT_VARIABLE, "")
    with contextlib.suppress(ValueError):
        seconds = float(given) if given else DEFAULT_HEARTBEAT_S
        if seconds == 0 or 0.5 <= seconds < float("inf"):
            return seconds
    raise ConfigError(
        f"{HEARTBEAT_VARIABLE}={given}",
        expected="a number of seconds of at least 0.5, or 0 to judge no silence",
        remedy="set another value, or unset it",
    )


def start_monitor(
    monitor: RankMonitor, world_size: int, gather: Callable[[Any], list[Any]], interrupt: Callable[[], None]
) -> None:
    """Makes the coordinator on rank 0 and connects every rank's monitor to it. Collective.

    Args:
        gather: gives the values of all ranks.
        interrupt: wakes what waits for other ranks.

    Raises:
        EngineError: a rank cannot connect, on every rank.
    """
    here = host_identity()
    hosts = gather(here)
    coordinator, offer = None, None
    if monitor.rank == 0:
        seconds, token = heartbeat_s(), secrets.token_hex(16)
        coordinator = FailureCoordinator(token, seconds, "127.0.0.1" if len(set(hosts)) == 1 else "", here)
        coordinator.start()
        offer = (socket.getfqdn(), coordinator.port, token, seconds, os.getpid(), started_at(os.getpid()))
    name, port, token, seconds, pid, started = gather(offer)[0]
    visible = here == hosts[0]
    addresses = ["127.0.0.1"] if visible else [a for a in (os.environ.get("MASTER_ADDR"), name) if a]
    connection = _welcomed(addresses, port, monitor.rank, token, here, seconds)
    refused = [rank for rank, connected in enumerate(gather(connection is not None)) if not connected]
    if refused or connection is None:
        if coordinator is not None:
            coordinator.drop()
        raise EngineError(
            f"rank {refused[0]} cannot connect to rank 0 at {', '.join(addresses)}, port {port}",
            expected="connections between all ranks",
            remedy="set MASTER_ADDR to a name of rank 0's machine that all others resolve, and let them connect to "
            "its ports",
        )
    monitor.connect(
        connection, CoordinatorHost(pid=pid, started=started, visible=visible), coordinator, seconds, interrupt
    )
    _LIVE[:] = [w for w in _LIVE if not w.closed] + [monitor]
    _install()


def _welcomed(addresses: list[str], port: int, rank: int, token: str, here: str, seconds: float) -> JsonSocket | None:
    """A connection that the coordinator has welcomed; None where it cannot be made."""
    hello = {"token": token, "rank": rank, "host": here, "pid": os.getpid(), "started": started_at(os.getpid())}
    for address in addresses:
        with contextlib.suppress(OSError):
            connection = JsonSocket(socket.create_connection((address, port), timeout=HELLO_WITHIN_S), seconds)
            if connection.send({"hello": hello}) and connection.receive():
                return connection
    return None


def wake(groups: list[Any], rank: int) -> None:
    """Ends the connections of process groups, from any thread; what waits in them, here or at a peer, gets an error.

    Under gloo a receive that times out closes the pairs of its group, under NCCL there is `abort`.
    """
    for group in groups:
        with contextlib.suppress(RuntimeError, ValueError):
            if dist.get_backend(group) != "gloo":
                group.abort()
                continue
            peer = next((r for r in dist.get_process_group_ranks(group) if r != rank), None)
            if peer is not None:
                nothing = torch.empty(1, dtype=torch.uint8)
                work = dist.irecv(nothing, peer, group=group, tag=_UNUSED_TAG)
                assert work is not None
                work.wait(timedelta(milliseconds=1))


# -- leaving ----------------------------------------------------------------------------------------------------------

_LIVE: list[RankMonitor] = []
_installed: list[bool] = []


def _install() -> None:
    """Once for each process."""
    if _installed:
        return
    _installed.append(True)
    atexit.register(_say_goodbye)
    os.register_at_fork(after_in_child=_forget_in_child)
    previous = sys.excepthook

    def tell_and_raise(kind: Any, value: BaseException, trace: Any) -> None:
        for monitor in _LIVE:
            monitor.leave(value)
        previous(kind, value, trace)

    sys.excepthook = tell_and_raise


def _say_goodbye() -> None:
    for monitor in _LIVE:
        monitor.close()


def _forget_in_child() -> None:
    """A forked process (a worker of a data loader) must not keep the connections of a rank open when that is killed."""
    for monitor in _LIVE:
        monitor.drop()
    _LIVE.clear()
