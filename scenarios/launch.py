"""Runs a function on several gloo processes, with a timeout that kills them all, and returns each result."""

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

CONTEXT = mp.get_context("forkserver")
_SERVERS = [forkserver.ForkServer() for _ in range(2)]
NUM_SEEDS = len(_SERVERS)
EXIT_WITHIN_S = 10.0
_PRELOADED = (
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch._dynamo",
    "autopipe",
    "scenarios.pipelines",
)
Results = list[tuple[str, Any]]
"""For each rank ("ok", result), ("raised", traceback), ("died", exit code), ("hung", "") or ("did not exit", ...)."""


def preload(*modules: str) -> None:
    """Let the servers that processes are forked from import more. Only before the first of them is started."""
    for server in _SERVERS:
        server.set_forkserver_preload([*_PRELOADED, *modules])


preload()


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Run `function(*args)` on every rank; return the results by rank.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or the time is over; all ranks are killed.
    """
    return values(try_ranks(function, num_ranks, *args, timeout_s=timeout_s))


def values(results: Results) -> list[Any]:
    """Return the results of ranks that have all ended well.

    Raises:
        AssertionError: one has not.
    """
    for rank, (kind, value) in enumerate(results):
        if kind != "ok":
            raise AssertionError(f"rank {rank} {kind}:\n{value}")
    return [value for _, value in results]


def try_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120.0) -> Results:
    """Run `function(*args)` on every rank; return what came of each."""
    pipes, processes = start_ranks(function, num_ranks, *args)
    try:
        results = collect(pipes, processes, time.monotonic() + timeout_s)
        for rank, process in enumerate(processes):
            process.join(EXIT_WITHIN_S)
            if process.is_alive() and results[rank][0] != "hung":
                results[rank] = ("did not exit", results[rank])
        return results
    finally:
        end(processes)


def start_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> tuple[list[Connection], list[Any]]:
    """Start `function(*args)` on every rank; return result pipes and processes, which the caller ends."""
    port = free_port()
    pipes, processes = [], []
    for rank in range(num_ranks):
        here, there = CONTEXT.Pipe(duplex=False)
        processes.append(start_process(rank, _main, there, function, args, rank, num_ranks, port))
        there.close()
        pipes.append(here)
    return pipes, processes


def start_process(rank: int, function: Callable[..., Any], *args: Any) -> Any:
    """Fork a process for a rank."""
    process = CONTEXT.Process(target=function, args=args, daemon=True)
    with _hashing_like(rank):
        process.start()
    return process


@contextlib.contextmanager
def _hashing_like(rank: int) -> Iterator[None]:
    """Let neighbouring ranks hash strings differently, as under torchrun: the order of a set differs too."""
    number = rank % NUM_SEEDS
    server, seed = _SERVERS[number], {"PYTHONHASHSEED": str(number + 1)}
    connect = mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process)
    with connect, mock.patch.dict(os.environ, seed):
        yield


def end(processes: Sequence[Any]) -> None:
    """Kill processes."""
    for process in processes:
        process.kill()
        process.join()


def collect(pipes: Sequence[Connection], processes: Sequence[Any], deadline: float) -> Results:
    """Receive one result from each rank, until a time of `time.monotonic()`."""
    results: dict[int, tuple[str, Any]] = {}
    while len(results) < len(pipes) and time.monotonic() < deadline:
        open_pipes = {p: i for i, p in enumerate(pipes) if i not in results}
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        for pipe, rank in open_pipes.items():
            if pipe not in ready:
                continue
            try:
                results[rank] = pipe.recv()
            except (EOFError, ConnectionResetError):
                processes[rank].join(5)
                results[rank] = ("died", processes[rank].exitcode)
    return [results.get(i, ("hung", "")) for i in range(len(pipes))]


def run_as_rank(
    pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...], rank: int, num_ranks: int, port: int
) -> None:
    """Run a function in the environment of a launch, and send ("ok", its result) or ("raised", the traceback)."""
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


def _main(pipe: Connection, *job: Any) -> None:
    run_as_rank(pipe, *job)
    pipe.close()
