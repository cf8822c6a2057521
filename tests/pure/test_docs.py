"""The documents are true of the code: links resolve, commands parse, tables of errors and fields are complete; errors have remedies."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import autopipe.errors
from autopipe.cli.options import parser
from autopipe.plan import Baseline, Candidate, Plan, StagePlan, Transfer
from autopipe.report.comparison import MeasuredStage
from profiler.records import LinkProfile, NodeProfile, ParameterProfile, Profile

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [p for package in ("autopipe", "profiler") for p in sorted((ROOT / package).rglob("*.py"))]
ERRORS = sorted({"DescribedError", *autopipe.errors.__all__})


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def commands() -> Iterator[str]:
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL):
            yield from (line for line in block.splitlines() if re.match(r"(\S+=\S+ )*(\S*/)?autopipe ", line))


@pytest.mark.parametrize("line", list(commands()))
def test_commands_are_the_commands_there_are(line: str) -> None:
    words = shlex.split(line, comments=True)
    options = parser().parse_args(words[next(i for i, w in enumerate(words) if w.endswith("autopipe")) + 1 :])
    model = getattr(options, "model", None)
    if model and ":" in model:
        assert (ROOT / model.partition(":")[0]).exists(), line


def test_every_error_class_is_in_the_table() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    for name in autopipe.errors.__all__:
        assert f"`{name}`" in text or f"`autopipe.{name}`" in text, name


def test_every_field_is_described() -> None:
    text = (ROOT / "docs" / "formats.md").read_text()
    for record in (
        Profile,
        NodeProfile,
        ParameterProfile,
        LinkProfile,
        Plan,
        StagePlan,
        Transfer,
        Baseline,
        Candidate,
        MeasuredStage,
    ):
        for field in dataclasses.fields(record):
            assert f"`{field.name}`" in text, f"{record.__name__}.{field.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tests_that_are_named_are_there(page: Path) -> None:
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
        assert (ROOT / path).is_file(), f"{page.name}: {path}"
        assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{page.name}: {path}::{name}"


def made_errors(path: Path) -> Iterator[ast.Call]:
    """The calls in a file that make an error of autopipe, under its own name or one that it was imported or passed under."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in ERRORS or (isinstance(node.func, ast.Name) and name == "error"):
                yield node


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_error_has_a_remedy(path: Path) -> None:
    for call in made_errors(path):
        remedy = next((k.value for k in call.keywords if k.arg == "remedy"), None)
        assert remedy is not None, f"{path}:{call.lineno} has no remedy"
        assert not (isinstance(remedy, ast.Constant) and not remedy.value), f"{path}:{call.lineno} has an empty remedy"


def test_errors_are_found_at_all() -> None:
    assert sum(len(list(made_errors(path))) for path in SOURCES) > 60
