"""Writes `docs/reference.md` from the docstrings of the public names: `python docs/make_reference.py`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import autopipe
import profiler

PAGE = Path(__file__).with_name("reference.md")
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):")
ENTRY = re.compile(r"([\w, *`.|\[\]]+): (.+)")


def reference() -> str:
    """The whole page."""
    lines = ["# Reference", "", "Made from the docstrings by `python docs/make_reference.py`; a test keeps it true."]
    for package in (autopipe, profiler):
        lines += ["", f"## {package.__name__}", "", *described(package)]
        for name in package.__all__:
            lines += entry(f"{package.__name__}.{name}", getattr(package, name))
    return "\n".join(lines) + "\n"


def entry(name: str, value: Any) -> Iterator[str]:
    """A function, or a class with its public methods and properties."""
    yield from ("", f"### {name}", "")
    if not isinstance(value, type):
        yield from (*code(name, value), *described(value))
        return
    if issubclass(value, Exception):
        yield from described(value)
        return
    yield from described(value)
    for member, found in members(value).items():
        if member.startswith("_") or not is_documented(found):
            continue
        if isinstance(found, property):
            yield from ("", f"#### {name}.{member}", "", *described(found))
        else:
            bound = getattr(value, member)
            yield from ("", f"#### {name}.{member}()", "", *code(f"{name.rpartition('.')[2]}.{member}", bound))
            yield from described(bound)


def members(value: type) -> dict[str, Any]:
    """What a class and its bases in these packages define, its own first."""
    found: dict[str, Any] = {}
    for base in value.__mro__:
        if base.__module__.partition(".")[0] in (autopipe.__name__, profiler.__name__):
            found = found | {name: member for name, member in vars(base).items() if name not in found}
    return found


def is_documented(member: Any) -> bool:
    is_callable = inspect.isfunction(member) or isinstance(member, (property, classmethod, staticmethod))
    return is_callable and bool(inspect.getdoc(member))


def code(name: str, function: Any) -> Iterator[str]:
    """The signature, broken where it is long."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    given = [plain(str(p)) for p in parameters]
    kinds = [p.kind for p in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        given.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returned = signature.return_annotation
    end = ")" if returned is inspect.Signature.empty else f") -> {plain(str(returned))}"
    line = f"{name}({', '.join(given)}{end}"
    lines = [line] if len(line) <= 110 else [f"{name}(", *(f"    {g}," for g in given), end]
    yield from ("```text", *lines, "```", "")


def plain(text: str) -> str:
    """An annotation or default as it is written in the code."""
    text = re.sub(r"(^|: )'([^']*)'", r"\1\2", text)
    return re.sub(r"<(?:class|function) '?([\w.]+)'?[^>]*>", r"\1", text)


def described(value: Any) -> Iterator[str]:
    """A docstring as Markdown: sections in bold, their entries as a list."""
    in_section = False
    for line in (inspect.getdoc(value) or "").splitlines():
        if SECTION.fullmatch(line):
            in_section = True
            yield from (f"**{line[:-1]}**", "")
        elif in_section and line.startswith("    ") and not line.startswith("     "):
            found = ENTRY.fullmatch(line.strip())
            yield f"- `{found[1]}`: {found[2]}" if found else f"- {line.strip()}"
        elif in_section and line.startswith("     "):
            yield textwrap.indent(line.strip(), "  ")
        else:
            in_section = in_section and not line
            yield line


if __name__ == "__main__":
    PAGE.write_text(reference())
