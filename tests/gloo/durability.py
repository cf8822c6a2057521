"""Runs a matrix of `benchmarks/durability` in a process of its own, and reads what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def ran(name: str, *arguments: str, folder: Path, timeout_s: float = 240.0) -> Any:
    """Run `python -m benchmarks.durability NAME` with these arguments; return its JSON.

    Raises:
        AssertionError: it wrote none.
    """
    output = folder / f"{name}.json"
    option = "--json" if name == "faults" else "--output"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.durability", name, *arguments, option, str(output)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert output.exists(), done.stderr[-3000:]
    return json.loads(output.read_text())
