"""`import autopipe` beside files of the user's that have the names of its packages."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import autopipe

ROOT = Path(__file__).parents[2]


def _run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(script)
    return subprocess.run(
        [sys.executable, str(folder / "train.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )


@pytest.mark.parametrize("file", ["profiler.py", "profiler/__init__.py"])
@pytest.mark.parametrize("before", ["", "import profiler\n"])
def test_a_profiler_of_the_users_is_named(tmp_path: Path, file: str, before: str) -> None:
    own = tmp_path / file
    own.parent.mkdir(exist_ok=True)
    own.write_text("def profile(): ...\n")
    done = _run(tmp_path, f"{before}import autopipe\n")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and str(own) in last and "Rename" in last


def test_without_one_it_imports(tmp_path: Path) -> None:
    assert _run(tmp_path, "import autopipe, profiler\nassert profiler.profile\n").returncode == 0


def test_the_version_is_that_of_the_installed_package() -> None:
    assert autopipe.__version__ == importlib.metadata.version("torch-autopipe")
