"""Runs a function on several gloo processes that tests share; they plan quickly unless a test asks for measurements.

What a first engine of a process imports takes longer than most tests. Tests that kill ranks or look at how they end
use `try_ranks`, which forks new ones.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from scenarios import launch
from scenarios.launch import CONTEXT, EXIT_WITHIN_S, NUM_SEEDS, Results, free_port
from tests.gloo.rank import planned_quickly, serve

launch.preload("pytest", "tests.gloo.rank")


def run_ranks(
    function: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout_s: float = 120.0,
    measured: bool = False,
    fresh: bool = False,
) -> list[Any]:
    """Run `function(*args)` on every rank; return the results by rank.

    Args:
        measured: the engine measures what it plans; otherwise `quick_planning` stands in for that.
        fresh: in processes that have run nothing before, for what depends on their memory, or changes them for good.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or the time is over; all ranks are killed.
    """
    attempt = try_ranks if fresh else _try_kept_ranks
    return launch.values(attempt(function, num_ranks, *args, timeout_s=timeout_s, measured=measured))


def run_in_turn(
    num_ranks: int, calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], *, measured: bool = False
) -> list[list[Any]]:
    """Run functions one after another in one launch; return for each call the results by rank."""
    ranks = run_ranks(_in_turn, num_ranks, list(calls), timeout_s=240.0, measured=measured)
    return [[rank[i] for rank in ranks] for i in range(len(calls))]


def _in_turn(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    torch.distributed.init_process_group("gloo")  # so that no engine takes it along when it is closed
    return [function(*args) for function, args in calls]


def try_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120.0, measured: bool = False
) -> Results:
    """Run `function(*args)` on every rank, in new processes; return what came of each."""
    job, arguments = (function, args) if measured else (planned_quickly, (function, *args))
    return launch.try_ranks(job, num_ranks, *arguments, timeout_s=timeout_s)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A process that runs one job after another."""

    pipe: Connection
    process: Any


_IDLE: list[list[_Kept]] = [[] for _ in range(NUM_SEEDS)]


def _try_kept_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float, measured: bool
) -> Results:
    """As `try_ranks`, in processes that are used again, unless one fails or cannot clean up."""
    port, ranks = free_port(), [_idle(rank) for rank in range(num_ranks)]
    job, arguments = (function, args) if measured else (planned_quickly, (function, *args))
    pipes, processes = [kept.pipe for kept in ranks], [kept.process for kept in ranks]
    clean = [False] * num_ranks
    try:
        for rank, pipe in enumerate(pipes):
            pipe.send((job, arguments, rank, num_ranks, port))
        results = launch.collect(pipes, processes, time.monotonic() + timeout_s)
        if all(kind == "ok" for kind, _ in results):
            told = launch.collect(pipes, processes, time.monotonic() + EXIT_WITHIN_S)
            clean = [answer == ("clean", True) for answer in told]
            results = [
                ("did not end after", result) if answer[0] == "hung" else result
                for result, answer in zip(results, told, strict=True)
            ]
        return results
    finally:
        launch.end([kept.process for kept, again in zip(ranks, clean, strict=True) if not again])
        for rank, (kept, again) in enumerate(zip(ranks, clean, strict=True)):
            if again:
                _IDLE[rank % NUM_SEEDS].append(kept)
            else:
                kept.pipe.close()


def _idle(rank: int) -> _Kept:
    """Return a process for this rank: one that has nothing to do, or a new one."""
    idle = _IDLE[rank % NUM_SEEDS]
    while idle:
        kept = idle.pop()
        if kept.process.is_alive():
            return kept
        kept.pipe.close()
    here, there = CONTEXT.Pipe()
    kept = _Kept(here, launch.start_process(rank, serve, there))
    there.close()
    return kept


@atexit.register
def _end_all() -> None:
    for idle in _IDLE:
        for kept in idle:
            kept.pipe.close()
        for kept in idle:
            kept.process.join(EXIT_WITHIN_S)
        launch.end([kept.process for kept in idle])
        idle.clear()
