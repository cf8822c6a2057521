"""Names go in, each is worked on in a forked process of its own with a limit of processor time; one JSON line a name
comes out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAITING = 5  # a process that waits for the processor may take so many times the limit
MEMORY_LIMIT = 18 << 30  # bytes of address space of one process


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The newest result of every name."""
    if not path.exists():
        return {}
    return {one["name"]: one for one in map(json.loads, path.read_text().splitlines())}


def run_all(
    names: list[str],
    work: Callable[[str], dict[str, Any]],
    out: Path,
    workers: int,
    limit_s: float,
    budget_s: float = math.inf,
) -> int:
    """Appends `{"name": ..., ...}` to `out` for every name; starts none after `budget_s`. Returns how many are left."""
    waiting, running, first = names[::-1], dict[int, tuple[str, Path, float]](), time.monotonic()
    while waiting or running:
        if time.monotonic() - first > budget_s and not running:
            break
        while waiting and len(running) < workers and time.monotonic() - first <= budget_s:
            name = waiting.pop()
            result = out.with_suffix(f".{abs(hash(name))}.part")
            running[_start(name, work, result, limit_s)] = (name, result, time.monotonic())
        time.sleep(0.05)
        for pid, (name, result, begun) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            late = time.monotonic() - begun > WAITING * limit_s
            if not ended and late:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if ended or late:
                del running[pid]
                _collect(name, result, out, status, late, time.monotonic() - begun)
    return len(waiting)


def _start(name: str, work: Callable[[str], dict[str, Any]], result: Path, limit_s: float) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s), int(limit_s) + 5))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        answer = work(name)
    except BaseException as cause:  # noqa: BLE001 (the child reports whatever stopped it)
        answer = {
            "outcome": "error",
            "why": "".join(traceback.format_exception_only(cause))[:400],
            "trace": traceback.format_exc()[-3000:],
        }
    result.write_text(json.dumps(answer, default=str))
    os._exit(0)


def _collect(name: str, result: Path, out: Path, status: int, late: bool, wall_s: float) -> None:
    answer: dict[str, Any] = {
        "outcome": "error",
        "why": "over the time limit" if late or status == signal.SIGXCPU else f"the process died, status {status}",
    }
    with contextlib.suppress(OSError, json.JSONDecodeError):
        answer = json.loads(result.read_text())
        result.unlink()
    with out.open("a") as file:
        file.write(json.dumps({"name": name, "wall_s": round(wall_s, 2), **answer}) + "\n")
    print(f"{name}: {answer['outcome']} {str(answer.get('why', ''))[:160]}", flush=True)
