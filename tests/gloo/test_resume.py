"""Restarts and preemption of `examples/resume.py`, as torchrun and a scheduler do them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from scenarios.launch import free_port

ROOT = Path(__file__).parents[2]


def _start(folder: Path, *options: str) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", f"--master-port={free_port()}"]
    small = ["--batch=8", "--width=16", "--save-every=3", f"--checkpoints={folder}/checkpoints"]
    return subprocess.Popen(
        [sys.executable, *torchrun, "examples/resume.py", *small, f"--weights={folder}/weights.pt", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_rank_and_a_preempted_run_end_with_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed, killed, preempted = tmp_path / "undisturbed", tmp_path / "killed", tmp_path / "preempted"
    for folder in (undisturbed, killed, preempted):
        folder.mkdir()
    runs = [_start(undisturbed, "--steps=12"), _start(killed, "--steps=12", "--crash")]
    said = [run.communicate(timeout=150)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    crashed_at = int(re.findall(r"is killed after step (\d+)", said[1])[0])
    went_on = re.findall(r"goes on after step (\d+)", said[1])
    assert [int(step) for step in went_on] == ([crashed_at // 3 * 3] if crashed_at >= 3 else []), said[1]

    long = _start(preempted, "--steps=1000000")
    assert long.stdout is not None
    while "saved" not in (line := long.stdout.readline()):
        assert line, "ended before the first checkpoint"
    worker = _children(long.pid)[0]
    os.kill(worker, signal.SIGTERM)  # one rank alone is asked to end
    rest, _ = long.communicate(timeout=60)
    assert long.returncode == 0, rest
    steps = int(max(p.name for p in (preempted / "checkpoints").glob("step-*")).removeprefix("step-"))
    assert steps >= 3
    expected, found = (torch.load(f / "weights.pt", weights_only=True) for f in (undisturbed, killed))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def _children(pid: int) -> list[int]:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        ranks = [c for c in found if b"resume.py" in Path(f"/proc/{c}/cmdline").read_bytes()]
        if ranks:
            return ranks
        time.sleep(0.1)
    raise AssertionError("torchrun has no children")
