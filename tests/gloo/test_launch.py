"""Ranks that tests share: a change to a process is gone in the next test, or the process is not used again."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist

import autopipe.engine.step.program_cache as program_cache
from tests.gloo.launch import run_ranks


def _state() -> tuple[object, ...]:
    return (
        os.getcwd(),
        os.environ.get("AUTOPIPE_TEST_LEFT"),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        signal.getsignal(signal.SIGTERM),
        len(logging.getLogger("autopipe").handlers),
        len(warnings.filters),
        dist.is_initialized(),
        float(torch.rand(())),
    )


def _untidy() -> tuple[int, tuple[object, ...]]:
    before = _state()
    os.chdir("/")
    os.environ["AUTOPIPE_TEST_LEFT"] = "1"
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.getLogger("autopipe").addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    return os.getpid(), before


def test_the_next_test_finds_a_process_as_it_was() -> None:
    first, second = run_ranks(_untidy, 2), run_ranks(_untidy, 2)
    assert first == second  # the same processes, in the same state


def _changed(how: str) -> int:
    if how == "a module":
        program_cache.MAX_PROGRAMS = 3
    elif how == "a class":
        program_cache.ProgramCache.get = None  # type: ignore[assignment, method-assign]
    elif how == "a thread":
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return os.getpid()


@pytest.mark.parametrize("how", ["a module", "a class", "a thread"])
def test_a_process_that_cannot_be_cleaned_is_not_used_again(how: str) -> None:
    (first,), (again,) = run_ranks(_changed, 1, how), run_ranks(_changed, 1, "")
    assert first != again


def _fails() -> None:
    raise ValueError("a mistake of the test")


def test_a_failure_and_a_hang_end_all_ranks() -> None:
    with pytest.raises(AssertionError, match=r"rank 0 raised:[\s\S]*a mistake of the test"):
        run_ranks(_fails, 2)
    with pytest.raises(AssertionError, match="rank 0 hung"):
        run_ranks(time.sleep, 1, 60, timeout_s=0.5)
    assert run_ranks(os.getpid, 1)[0] != os.getpid()
