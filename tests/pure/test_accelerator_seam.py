"""Only `profiler/accelerator.py` names an accelerator or its process-group backend."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEAM = ROOT / "profiler" / "accelerator.py"
FILES = sorted(path for package in ("autopipe", "profiler") for path in (ROOT / package).rglob("*.py"))


def _names(path: Path) -> Iterator[str]:
    """Identifiers and literals of a file; docstrings may explain what an accelerator does."""
    tree = ast.parse(path.read_text())
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in alone:
            continue
        for field in ("id", "attr", "name", "arg", "value", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_other_file_names_an_accelerator(path: Path) -> None:
    found = [name for name in _names(path) if "cuda" in name.lower() or "nccl" in name.lower()]
    assert bool(found) == (path == SEAM), found
