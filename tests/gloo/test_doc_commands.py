"""The quick commands of README.md and docs/*.md, in this process and in the order of their page; `make docs` runs them
all."""

from __future__ import annotations

import runpy
import shlex
from pathlib import Path

import pytest

from autopipe.cli import main

ROOT = Path(__file__).parents[2]
RUNNER = runpy.run_path(str(ROOT / "docs" / "run_commands.py"))
PAGES = ["README.md", "docs/user-guide.md", "docs/formats.md"]
QUICK = {"report", "plan", "simulate", "export", "env"}
SLOW = {"autopipe report --measured run.json --trace trace.json -o run.html"}  # comes after a run


def quick_commands(page: Path) -> list[str]:
    """The commands of a page that need no training before them."""
    found = [item.text for item in RUNNER["items"](page) if isinstance(item, RUNNER["Command"])]
    return [text for text in found if text not in SLOW and QUICK & set(_arguments(text)[:1])]


def _arguments(text: str) -> list[str]:
    """What follows the word `autopipe` in a command; nothing where it is another's."""
    words = shlex.split(text, comments=True)
    return next((words[i + 1 :] for i, word in enumerate(words) if Path(word).name == "autopipe"), [])


@pytest.mark.parametrize("name", PAGES)
def test_quick_commands_succeed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for file in RUNNER["items"](ROOT / name):
        if isinstance(file, RUNNER["File"]):
            RUNNER["write"](file, tmp_path)
    commands = quick_commands(ROOT / name)
    assert commands
    for text in commands:
        assert main(_arguments(text)) == 0, text
