"""One process that tests share: runs one function after another as a rank of a launch, and cleans up after each."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from autopipe.engine.failures import bootstrap
from scenarios.launch import run_as_rank
from tests.gloo.quick_planning import quick_planning

THREADS_END_WITHIN_S = 1.0
_WATCHED, _ALSO = ("autopipe", "profiler", "tests"), ("torch", "os", "time")


def planned_quickly(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function with `quick_planning`."""
    with quick_planning():
        return function(*args)


def serve(pipe: Connection) -> None:
    """Runs one job after another. After each it sends whether it takes another; where it does not, it ends."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread that outlives a job
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        before = _Process()
        random.seed(0)
        run_as_rank(pipe, *job)
        del job
        clean = before.restore()
        pipe.send(("clean", clean))
        if not clean:
            return


class _Process:
    """The state of this process that a job may change."""

    def __init__(self) -> None:
        self.environ, self.folder = dict(os.environ), os.getcwd()
        self.filters, self.hook = warnings.filters[:], sys.excepthook
        self.signals = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGALRM)}
        self.argv, self.path, self.main = sys.argv[:], sys.path[:], sys.modules["__main__"]
        self.loggers = {name: _logger_state(logger) for name, logger in _loggers().items()}
        self.threads = set(threading.enumerate())
        self.names = _names()

    def restore(self) -> bool:
        """Puts back what can be put back; says whether that was everything."""
        if any(not monitor.closed for monitor in bootstrap._LIVE):
            return False  # an engine that was not closed: only the end of the process ends its threads and connections
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
        torch.set_num_threads(1)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        if not self._threads_have_ended() or not _same(self.names, _names()):
            return False
        for name in os.environ.keys() - self.environ.keys():
            del os.environ[name]
        os.environ.update(self.environ)
        os.chdir(self.folder)
        warnings.filters[:] = self.filters  # type: ignore[index]
        warnings._filters_mutated()  # type: ignore[attr-defined]
        for number, handler in self.signals.items():
            signal.signal(number, handler)
        sys.argv, sys.path[:], sys.modules["__main__"] = self.argv, self.path, self.main
        for name, logger in _loggers().items():
            logger.handlers, logger.level, logger.propagate, logger.disabled = self.loggers.get(
                name, ([], 0, True, False)
            )
            logger.manager._clear_cache()  # type: ignore[attr-defined]
        return True

    def _threads_have_ended(self) -> bool:
        deadline = time.monotonic() + THREADS_END_WITHIN_S
        while set(threading.enumerate()) - self.threads:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True


def _loggers() -> dict[str, logging.Logger]:
    named = {n: g for n, g in logging.root.manager.loggerDict.items() if isinstance(g, logging.Logger)}
    return {"": logging.root, **named}


def _logger_state(logger: logging.Logger) -> tuple[list[logging.Handler], int, bool, bool]:
    return logger.handlers[:], logger.level, logger.propagate, logger.disabled


def _names() -> dict[tuple[str, ...], Any]:
    """What the names of the modules under test, of their classes, of torch and of os stand for."""
    found: dict[tuple[str, ...], Any] = {}
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        if name.partition(".")[0] in _WATCHED or name in _ALSO:
            for key, value in list(vars(module).items()):
                found[name, key] = value
                if isinstance(value, type) and value.__module__ == name and name not in _ALSO:
                    found.update({(name, key, k): v for k, v in vars(value).items()})
    return found


def _same(before: dict[tuple[str, ...], Any], after: dict[tuple[str, ...], Any]) -> bool:
    """Whether no name stands for something else than before; new ones do no harm."""
    gone = object()
    return all(after.get(name, gone) is value or isinstance(value, types.ModuleType) for name, value in before.items())
