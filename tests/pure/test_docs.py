"""The documents are true of the code: links resolve, commands parse, names of Python are there, tables of errors and
fields are complete; errors have remedies."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import autopipe.errors
import profiler
from autopipe.cli.options import parser
from autopipe.plan import Baseline, Candidate, Plan, StagePlan, Transfer
from autopipe.report.comparison import MeasuredStage
from profiler.records import LinkProfile, NodeProfile, ParameterProfile, Profile

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [p for package in ("autopipe", "profiler") for p in sorted((ROOT / package).rglob("*.py"))]
RUNNER = runpy.run_path(str(ROOT / "docs" / "run_commands.py"))
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


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", PAGES[0].read_text()))
    assert linked == {f"docs/{page.name}" for page in PAGES[1:]}


def commands() -> Iterator[str]:
    """The commands of the pages, in blocks and in the text; not those that are cut short."""
    for page in PAGES:
        found = [item.text for item in RUNNER["items"](page) if isinstance(item, RUNNER["Command"])]
        found += re.findall(r"`(autopipe \w[^`]* [^`…]*)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
        yield from (line for line in found if re.match(r"(\S+=\S+ )*(\S*/)?autopipe ", line))


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_commands_are_the_commands_there_are(line: str) -> None:
    words = shlex.split(re.sub(r"\b[KMN]\b", "2", line))
    words = words[next(i for i, w in enumerate(words) if w.endswith("autopipe")) + 1 :]
    options = parser().parse_args(words)
    model = getattr(options, "model", None)
    if model and ":" in model:
        assert (ROOT / model.partition(":")[0]).exists(), line


def test_the_list_of_commands_that_are_not_run_so_is_up_to_date() -> None:
    assert RUNNER["unused"]() == [], (
        "docs/run_commands.py lists commands that no page has: take them out, or correct them"
    )


def ours(page: Path) -> str:
    """A page; of one that sets another engine beside this one, the side that is ours: not its program, and not the left
    column of its table."""
    text = page.read_text()
    if page.name.startswith("migrate-"):
        text = re.sub(r"<!-- program: there -->\n```.*?```", "", text, flags=re.DOTALL)
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    return text


def snippets(page: Path) -> Iterator[ast.AST]:
    """The Python of a page that can be parsed: blocks, indented lines, and what stands in the text."""
    text = ours(page)
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        yield ast.parse(block)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`\n/]+)`|^ {4}(\S.*)$", text, flags=re.MULTILINE):
        try:
            yield ast.parse("".join(code).replace("…", "..."))
        except SyntaxError:
            continue


def named(node: ast.expr) -> Any:
    """What an expression names in these packages, an engine included; None: nothing of them."""
    if isinstance(node, ast.Name):
        return {"autopipe": autopipe, "profiler": profiler, "engine": autopipe.Engine}.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = named(node.value)
    if owner is None:
        return None
    if inspect.ismodule(owner) and not hasattr(owner, node.attr):
        return importlib.import_module(f"{owner.__name__}.{node.attr}")
    assert hasattr(owner, node.attr) or node.attr in getattr(owner, "__annotations__", {}), ast.unparse(node)
    found = getattr(owner, node.attr, None)
    return None if isinstance(found, property) else found


def wrong_keywords(call: ast.Call, function: Callable[..., Any]) -> list[str]:
    """The keywords of a call that a function does not take."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return []
    return [k.arg for k in call.keywords if k.arg is not None and k.arg not in parameters]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "reference.md"], ids=lambda p: p.name)
def test_names_and_keywords_of_python_exist(page: Path) -> None:
    for tree in snippets(page):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                named(node)
            elif isinstance(node, ast.Call) and (function := named(node.func)) is not None and callable(function):
                assert not wrong_keywords(node, function), ast.unparse(node)


THEIRS = {"requires_grad", "strict", "labels", "training_data"}
GUIDES = ["README.md", "user-guide.md", "faq.md", "migrate-deepspeed.md", "migrate-torch-pipelining.md"]


@pytest.mark.parametrize("name", GUIDES)
def test_settings_in_the_text_exist(name: str) -> None:
    """`zero_stage=1` in a text is an argument of `autopipe.pipeline`, `Constraints` or a method of the engine, or of
    torch and transformers."""
    methods = [f for _, f in inspect.getmembers(autopipe.Engine, inspect.isfunction)]
    known = {p for f in (autopipe.pipeline, autopipe.Constraints, *methods) for p in inspect.signature(f).parameters}
    page = next(p for p in PAGES if p.name == name)
    for setting in re.findall(r"`([a-z_]+)=[^`]*`", ours(page)):
        assert setting in known | THEIRS, f"{page.name}: {setting}="


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
    """The calls in a file that make an error of autopipe, under its own name or one that it was imported or passed
    under."""
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


def test_cited_transport_rules_are_in_the_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page[page.index("## Transport rules") : page.index("## A backward in two parts")]
    numbers = [int(n) for n in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 10
    cited = [
        int(number)
        for path in SOURCES
        for found in re.findall(r"\brules? ([\d, ]*\d)\b", path.read_text())
        for number in re.findall(r"\d+", found)
    ]
    assert cited and set(cited) <= set(numbers)


def test_the_planners_files_are_listed() -> None:
    page = (ROOT / "docs" / "planner.md").read_text()
    listed = set(re.findall(r"^\| `(partition/[\w/]+\.py)`", page, flags=re.MULTILINE))
    folder = ROOT / "autopipe"
    there = {str(p.relative_to(folder)) for p in (folder / "partition").rglob("*.py") if p.name != "__init__.py"}
    assert listed == there
