"""Starts a function on several gloo processes, with a timeout that kills them all, and gives back what each returned.

A process is forked for a test where something is to happen to it (`try_ranks`, `start_ranks`). All other tests share processes
(`run_ranks`): what a first engine of a process imports takes longer than most tests.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing as mp
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

from tests.gloo.rank import Job, run_job, serve

_CONTEXT = mp.get_context("forkserver")
_SERVERS = [forkserver.ForkServer() for _ in range(2)]
for _server in _SERVERS:
    _server.set_forkserver_preload(
        [
            "torch",
            "torch.distributed",
            "torch.distributed.checkpoint",
            "torch.distributed.device_mesh",
            "torch._dynamo",
            "pytest",
            "autopipe",
            "tests.gloo.rank",
            "tests.models.pipelines",
        ]
    )
EXIT_WITHIN_S = 10.0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_ranks(
    function: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout_s: float = 120.0,
    measured: bool = False,
    fresh: bool = False,
) -> list[Any]:
    """`function(*args)` on every rank; the results by rank.

    Args:
        measured: the engine measures what it plans; otherwise `quick_planning` stands in for that.
        fresh: in processes that have run nothing before, for what the memory of a process is, or where it is changed for good.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or the time is over; all ranks are killed.
    """
    attempt = try_ranks if fresh else _try_kept_ranks
    results = attempt(function, num_ranks, *args, timeout_s=timeout_s, measured=measured)
    for rank, (kind, value) in enumerate(results):
        if kind != "ok":
            raise AssertionError(f"rank {rank} {kind}:\n{value}")
    return [value for _, value in results]


def run_in_turn(
    num_ranks: int, calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], *, measured: bool = False
) -> list[list[Any]]:
    """Functions one after another in one launch, which is quicker than a launch each; for each call, the results by rank."""
    ranks = run_ranks(_in_turn, num_ranks, list(calls), timeout_s=240.0, measured=measured)
    return [[rank[i] for rank in ranks] for i in range(len(calls))]


def _in_turn(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    import torch

    torch.distributed.init_process_group("gloo")  # so that no engine takes it along when it is closed
    return [function(*args) for function, args in calls]


# -- processes of one test --------------------------------------------------------------------------------------------


def try_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120.0, measured: bool = False
) -> list[tuple[str, Any]]:
    """As `run_ranks`, in new processes, but gives for each rank ("ok", result), ("raised", traceback), ("died", exit code) or ("hung", "")."""
    pipes, processes = start_ranks(function, num_ranks, *args, measured=measured)
    try:
        results = _collect(pipes, processes, time.monotonic() + timeout_s)
        for rank, process in enumerate(processes):
            process.join(EXIT_WITHIN_S)
            if process.is_alive() and results[rank][0] != "hung":
                results[rank] = ("did not exit after", results[rank])
        return results
    finally:
        _end(processes)


def start_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, measured: bool = False
) -> tuple[list[Connection], list[Any]]:
    """Starts `function(*args)` on every rank; the pipes over which the results come, and the processes, which are the caller's to end."""
    port = free_port()
    pipes, processes = [], []
    for rank in range(num_ranks):
        here, there = _CONTEXT.Pipe(duplex=False)
        job = Job(function=function, args=args, rank=rank, num_ranks=num_ranks, port=port, measured=measured)
        processes.append(_started(rank, run_job, there, job))
        there.close()
        pipes.append(here)
    return pipes, processes


def _started(rank: int, function: Callable[..., Any], *args: Any) -> Any:
    process = _CONTEXT.Process(target=function, args=args, daemon=True)
    with _hashing_like(rank):
        process.start()
    return process


@contextlib.contextmanager
def _hashing_like(rank: int) -> Iterator[None]:
    """Neighbouring ranks hash strings differently, as under torchrun, so that what depends on the order of a set differs too."""
    number = rank % len(_SERVERS)
    server, seed = _SERVERS[number], {"PYTHONHASHSEED": str(number + 1)}
    connect = mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process)
    with connect, mock.patch.dict(os.environ, seed):
        yield


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        process.kill()
        process.join()


def _collect(pipes: Sequence[Connection], processes: Sequence[Any], deadline: float) -> list[tuple[str, Any]]:
    results: dict[int, tuple[str, Any]] = {}
    while len(results) < len(pipes) and time.monotonic() < deadline:
        open_pipes = [p for i, p in enumerate(pipes) if i not in results]
        for ready in wait(open_pipes, timeout=max(0.0, deadline - time.monotonic())):
            rank = pipes.index(ready)  # type: ignore[arg-type]
            try:
                results[rank] = ready.recv()  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                processes[rank].join(5)
                results[rank] = ("died", processes[rank].exitcode)
    return [results.get(i, ("hung", "")) for i in range(len(pipes))]


# -- processes that tests share ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kept:
    """A process that runs one job after another."""

    pipe: Connection
    process: Any


_IDLE: list[list[_Kept]] = [[] for _ in _SERVERS]


def _try_kept_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float, measured: bool
) -> list[tuple[str, Any]]:
    """As `try_ranks`, in processes that are used again, unless one fails or cannot clean up."""
    port, ranks = free_port(), [_idle(rank) for rank in range(num_ranks)]
    clean = [False] * num_ranks
    try:
        for rank, kept in enumerate(ranks):
            job = Job(function=function, args=args, rank=rank, num_ranks=num_ranks, port=port, measured=measured)
            kept.pipe.send(job)
        results = _collect([k.pipe for k in ranks], [k.process for k in ranks], time.monotonic() + timeout_s)
        if all(kind == "ok" for kind, _ in results):
            told = _collect([k.pipe for k in ranks], [k.process for k in ranks], time.monotonic() + EXIT_WITHIN_S)
            clean = [answer is True for answer in told]
            results = [
                ("did not end after", result) if answer == ("hung", "") else result
                for result, answer in zip(results, told, strict=True)
            ]
        return results
    finally:
        _end([kept.process for kept, again in zip(ranks, clean, strict=True) if not again])
        for rank, (kept, again) in enumerate(zip(ranks, clean, strict=True)):
            if again:
                _IDLE[rank % len(_SERVERS)].append(kept)
            else:
                kept.pipe.close()


def _idle(rank: int) -> _Kept:
    """A process for this rank: one that has nothing to do, or a new one."""
    idle = _IDLE[rank % len(_SERVERS)]
    while idle:
        kept = idle.pop()
        if kept.process.is_alive():
            return kept
        kept.pipe.close()
    here, there = _CONTEXT.Pipe()
    kept = _Kept(here, _started(rank, serve, there))
    there.close()
    return kept


@atexit.register
def _end_all() -> None:
    for idle in _IDLE:
        for kept in idle:
            kept.pipe.close()
        for kept in idle:
            kept.process.join(EXIT_WITHIN_S)
        _end([kept.process for kept in idle])
        idle.clear()
