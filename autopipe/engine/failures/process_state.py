"""The visible state of another process on this host: it runs, is stopped, or is gone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

State = Literal["running", "stopped", "gone"]


def host_identity() -> str:
    """Equal for processes that can see each other under `/proc`; of its own for each process where there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{os.uname().nodename} {os.getpid()}"


def started_at(pid: int) -> str:
    """Start time of a process, in clock ticks since boot; with the pid it names one process for good. Empty without
    `/proc`."""
    fields = _stat(pid)
    return fields[19] if fields else ""


def process_state(pid: int, started: str) -> State:
    """The state of a process of this host."""
    fields = _stat(pid)
    if not fields or fields[19] != started or fields[0] in "ZXx":
        return "gone"
    return "stopped" if fields[0] in "Tt" else "running"


def _stat(pid: int) -> list[str]:
    """The fields of `/proc/PID/stat` from the state on (proc(5) counts it as the third)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
