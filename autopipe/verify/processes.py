"""Run a function in several local gloo processes and return what each returned; none outlives the call."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from autopipe.errors import AutopipeError, EngineError

Result = TypeVar("Result")
GRACE_S = 5.0
"""Seconds that the other ranks have to report their own errors after the first has failed."""


def run_processes(function: Callable[[int], Result], num_ranks: int, *, timeout_s: float) -> list[Result]:
    """Run `function(rank)` in `num_ranks` processes with torchrun's environment, their own port and one thread each.

    Raises:
        AutopipeError: what a rank raised, if it is one.
        EngineError: a rank raised something else, died, or the time is over.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "autopipe"])
    port = _free_port()
    pipes, processes = [], []
    try:
        for rank in range(num_ranks):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_main, args=(there, function, rank, num_ranks, port), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        results = _collect(pipes, processes, timeout_s)
        for process in processes:
            process.join(GRACE_S)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[rank] for rank in range(num_ranks)]


def _collect(pipes: Sequence[Connection], processes: Sequence[Any], timeout_s: float) -> dict[int, Any]:
    results: dict[int, Any] = {}
    failures: dict[int, AutopipeError] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) + len(failures) < len(pipes) and time.monotonic() < deadline:
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results and rank not in failures}
        for ready in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
            rank = waiting[ready]  # type: ignore[index]
            value = _received(ready, processes[rank], rank)  # type: ignore[arg-type]
            if isinstance(value, AutopipeError):
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + GRACE_S)
            else:
                results[rank] = value
    if failures:
        raise _cause(failures)
    if len(results) < len(pipes):
        late = [rank for rank in range(len(pipes)) if rank not in results]
        raise EngineError(
            f"no result of rank {late[0]} after {timeout_s:g} s",
            expected="one training step in that time",
            where="verify",
            remedy="give more time with --timeout-s, or a smaller batch",
        )
    return results


def _received(pipe: Connection, process: Any, rank: int) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        process.join(GRACE_S)
        return EngineError(
            f"the process of rank {rank} died with exit code {process.exitcode}",
            expected="a process that ends by itself",
            where="verify",
            remedy="exit code -9 usually means out of memory: use a smaller batch or fewer stages",
        )


def _cause(failures: dict[int, AutopipeError]) -> AutopipeError:
    """The first failure by rank that is no consequence of another: a death or a wrong call before an engine's
    message."""
    ranked = sorted(failures.items(), key=lambda item: (isinstance(item[1], EngineError), item[0]))
    return ranked[0][1]


def _main(pipe: Connection, function: Callable[[int], Any], rank: int, num_ranks: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        pipe.send(function(rank))
    except AutopipeError as error:
        pipe.send(error)
    except Exception as error:  # noqa: BLE001  (whatever it is, the caller is told)
        last = traceback.extract_tb(error.__traceback__)[-1]
        pipe.send(
            EngineError(
                f"rank {rank}: {type(error).__name__}: {error}",
                where=f"{last.filename}:{last.lineno}",
                remedy="check that the model trains in one process first",
            )
        )
    pipe.close()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
