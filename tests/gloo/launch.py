"""Starts a function on several gloo processes, with a timeout that kills them all, and gives back what each returned."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

_CONTEXT = mp.get_context("forkserver")
_SERVERS = [forkserver.ForkServer() for _ in range(2)]
for _server in _SERVERS:
    _server.set_forkserver_preload(["torch", "torch.distributed", "autopipe", "tests.gloo.models"])
EXIT_WITHIN_S = 10.0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """`function(*args)` on every rank; the results by rank.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or the time is over; all ranks are killed.
    """
    results = try_ranks(function, num_ranks, *args, timeout_s=timeout_s)
    for rank, (kind, value) in enumerate(results):
        if kind != "ok":
            raise AssertionError(f"rank {rank} {kind}:\n{value}")
    return [value for _, value in results]


def run_in_turn(num_ranks: int, calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[list[Any]]:
    """Functions one after another in one launch, which is quicker than a launch each; for each call, the results by rank."""
    ranks = run_ranks(_in_turn, num_ranks, list(calls), timeout_s=240.0)
    return [[rank[i] for rank in ranks] for i in range(len(calls))]


def _in_turn(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    import torch

    torch.distributed.init_process_group("gloo")  # so that no engine takes it along when it is closed
    return [function(*args) for function, args in calls]


def try_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120.0
) -> list[tuple[str, Any]]:
    """As `run_ranks`, but gives for each rank ("ok", result), ("raised", traceback), ("died", exit code) or ("hung", "")."""
    pipes, processes = start_ranks(function, num_ranks, *args)
    try:
        results = _collect(pipes, processes, time.monotonic() + timeout_s)
        for rank, process in enumerate(processes):
            process.join(EXIT_WITHIN_S)
            if process.is_alive() and results[rank][0] != "hung":
                results[rank] = ("did not exit after", results[rank])
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def start_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> tuple[list[Connection], list[Any]]:
    """Starts `function(*args)` on every rank; the pipes over which the results come, and the processes, which are the caller's to end."""
    port = free_port()
    pipes, processes = [], []
    for rank in range(num_ranks):
        here, there = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_main, args=(there, function, args, rank, num_ranks, port), daemon=True)
        with _hashing_like(rank):
            process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    return pipes, processes


@contextlib.contextmanager
def _hashing_like(rank: int) -> Iterator[None]:
    """Neighbouring ranks hash strings differently, as under torchrun, so that what depends on the order of a set differs too."""
    number = rank % len(_SERVERS)
    server, seed = _SERVERS[number], {"PYTHONHASHSEED": str(number + 1)}
    connect = mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process)
    with connect, mock.patch.dict(os.environ, seed):
        yield


def _collect(pipes: list[Connection], processes: list[Any], deadline: float) -> list[tuple[str, Any]]:
    results: dict[int, tuple[str, Any]] = {}
    while len(results) < len(pipes) and time.monotonic() < deadline:
        open_pipes = [p for i, p in enumerate(pipes) if i not in results]
        for ready in wait(open_pipes, timeout=max(0.0, deadline - time.monotonic())):
            rank = pipes.index(ready)  # type: ignore[arg-type]
            try:
                results[rank] = ready.recv()  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join(5)
                results[rank] = ("died", processes[rank].exitcode)
    return [results.get(i, ("hung", "")) for i in range(len(pipes))]


def _main(pipe: Connection, function: Callable[..., Any], args: Any, rank: int, num_ranks: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        pipe.send(("ok", function(*args)))
    except BaseException:  # noqa: BLE001 (whatever it is, the parent is told)
        pipe.send(("raised", traceback.format_exc()))
    pipe.close()
