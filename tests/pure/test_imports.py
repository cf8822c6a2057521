"""Imports point one way: a file may import what stands before it in the order below, and nothing that stands after it.

Tests and benchmarks do not import each other; what both need is in `scenarios/`.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The order in which data flows; `docs/architecture.md` draws it. `profiler` stands before all of autopipe.
ORDER = [
    "profiler",
    "autopipe.errors",
    "autopipe.units",
    "autopipe.cluster",
    "autopipe.schedule",
    "autopipe.plan",
    "autopipe.cost",
    "autopipe.simulate",
    "autopipe.partition.effort",
    "autopipe.partition.bounds",
    "autopipe.partition.timing",
    "autopipe.partition.baselines",
    "autopipe.partition.graph",
    "autopipe.partition.constraints",
    "autopipe.partition.memory",
    "autopipe.partition.arguments",
    "autopipe.partition.problem",
    "autopipe.partition.dp",
    "autopipe.partition.infeasible",
    "autopipe.partition.search",
    "autopipe.partition.assemble",
    "autopipe.partition.planner",
    "autopipe.partition.cluster",
    "autopipe.partition.api",
    "autopipe.partition",
    "autopipe.report",
    "autopipe.capture",
    "autopipe.placement",
    "autopipe.stages",
    "autopipe.config",
    "autopipe.checkpoint",
    "autopipe.engine.failures",
    "autopipe.engine.ranks",
    "autopipe.engine.transport",
    "autopipe.engine.state",
    "autopipe.engine.step",
    "autopipe.engine.setup",
    "autopipe.engine.data_feed",
    "autopipe.engine.introspection",
    "autopipe.engine.training_loop",
    "autopipe.engine.engine",
    "autopipe.engine",
    "autopipe.api",
    "autopipe",
    "autopipe.verify",
    "autopipe.export",
    "autopipe.cli",
]
WITHOUT_TORCH = [
    "profiler/records.py",
    "profiler/errors.py",
    "profiler/devices.py",
    "profiler/sizes.py",
    "profiler/scaling.py",
    "autopipe/cluster.py",
    "autopipe/errors.py",
    "autopipe/plan.py",
    "autopipe/cost",
    "autopipe/partition",
    "autopipe/schedule",
    "autopipe/simulate",
    "autopipe/report",
]
# Modules of `profiler` that need no torch; everything else in it does.
PLAIN_PROFILER = {"profiler.records", "profiler.errors", "profiler.devices", "profiler.sizes", "profiler.scaling"}


def _files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{a.name}" if _is_module(f"{module}.{a.name}") else module for a in node.names}
    return found


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def _layer(module: str) -> int:
    best = max((name for name in ORDER if module == name or module.startswith(f"{name}.")), key=len, default="")
    return ORDER.index(best)


ALL = [*_files("autopipe"), *_files("profiler")]


@pytest.mark.parametrize("path", ALL, ids=[_module(p) for p in ALL])
def test_no_import_runs_back(path: Path) -> None:
    module = _module(path)
    for imported in _imports(path):
        if imported.split(".")[0] in ("autopipe", "profiler"):
            assert _layer(imported) <= _layer(module), f"{module} imports {imported}, which stands after it"


@pytest.mark.parametrize("place", WITHOUT_TORCH)
def test_pure_files_import_no_torch(place: str) -> None:
    target = ROOT / place
    for path in [target] if target.suffix else sorted(target.rglob("*.py")):
        for imported in _imports(path):
            assert imported.split(".")[0] != "torch", f"{path} imports {imported}"
            if imported.split(".")[0] == "profiler":
                assert imported in PLAIN_PROFILER, f"{path} imports {imported}, which needs torch"


@pytest.mark.parametrize(
    ("place", "refused"),
    [("tests", {"benchmarks"}), ("benchmarks", {"tests"}), ("scenarios", {"benchmarks", "tests"})],
)
def test_tests_and_benchmarks_do_not_import_each_other(place: str, refused: set[str]) -> None:
    files = _files(place)
    assert files
    for path in files:
        for imported in _imports(path):
            assert imported.split(".")[0] not in refused, f"{path} imports {imported}"
