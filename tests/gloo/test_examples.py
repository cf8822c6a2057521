"""Each example runs for a few steps in as many processes as its first line says; `make examples` runs them whole."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.gloo.launch import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = {
    "train_gpt": ["--steps", "2"],
    "resnet": ["--steps", "2"],
    "encoder_decoder": ["--steps", "2"],
    "mixture_of_experts": ["--steps", "2"],
    "replicas_zero1": ["--epochs", "1", "--samples", "256"],
    "plain_loop": ["--steps", "2"],
    "train_and_evaluate": ["--epochs", "1", "--windows", "128", "--checkpoints", "{tmp}"],
    "unet_skips": ["--steps", "2"],
    "transformers_gpt2": [],
    "convert_gpt2": ["--steps", "2", "--folder", "{tmp}"],
}
MEASURED = {"train_gpt", "resnet", "unet_skips"}
LAUNCHED_OTHERWISE = {"resume": "tests/gloo/test_resume.py", "dry_run_7b": "tests/single/test_cli.py"}


def _run(path: str, arguments: list[str]) -> None:
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def _first_line(name: str) -> str:
    return (EXAMPLES / f"{name}.py").read_text().partition("\n")[0]


def test_every_example_is_here_and_begins_with_its_command() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == SHORT.keys() | LAUNCHED_OTHERWISE.keys()
    for name in names:
        assert re.match(rf"# (torchrun|autopipe) .*examples/{name}\.py", _first_line(name)), name


@pytest.mark.parametrize("name", SHORT)
def test_example(name: str, tmp_path: Path) -> None:
    num_ranks = int(re.findall(r"--nproc-per-node (\d)", _first_line(name))[0])
    arguments = [a.format(tmp=tmp_path) for a in SHORT[name]]
    run_ranks(_run, num_ranks, str(EXAMPLES / f"{name}.py"), arguments, measured=name in MEASURED)
