"""The command line: its options are frozen, every command runs on a small model, and errors have one line and the right
status."""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

import autopipe
from autopipe.cli import main
from autopipe.cli.environment import VARIABLES
from autopipe.cli.options import parser
from autopipe.plan import Plan
from profiler.records import Profile

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(4)]
    return nn.Sequential(*blocks), (torch.randn(12, 16),)

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, *, mask):
        return self.second(self.first(x) * mask)

def masked():
    return Masked(), (torch.randn(4, 8),), {"mask": torch.ones(4, 8)}

def empty():
    return nn.Linear(2, 2), (torch.randn(0, 2),)

def broken():
    raise RuntimeError("no weights here")

def no_model():
    return 1, 2

value = 3
"""

PLANNING = [
    "--alone",
    "--cluster",
    "--data-parallel",
    "--device",
    "--first",
    "--global-batch",
    "--last",
    "--link-gbps",
    "--link-latency-us",
    "--memory-limit",
    "--num-devices",
    "--num-microbatches",
    "--num-stages",
    "--objective",
    "--overlap",
    "--profile",
    "--recompute",
    "--schedule",
    "--split-points",
    "--time-budget-s",
    "--together",
]
COMMON = ["--debug", "--format", "--help", "--output", "--quiet", "-h", "-o"]
FROZEN = {
    "convert": ["--debug", "--help", "--max-shard-size", "--names", "--quiet", "--to", "-h"],
    "env": COMMON,
    "export": [*COMMON, "--model", "--to"],
    "plan": [*COMMON, *PLANNING],
    "profile": [*COMMON, "--budget-s", "--device", "--from", "--from-device", "--nodes", "--num-microbatches"],
    "report": [*COMMON, *PLANNING, "--measured", "--plan", "--trace"],
    "simulate": [*COMMON, *PLANNING, "--plan"],
    "verify": [*COMMON, "--num-microbatches", "--num-stages", "--schedule", "--timeout-s", "--tolerance"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("cli")
    (path / "small_model.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOPIPE_CACHE_DIR", str(path / "cache"))
        patch.setattr(sys, "path", [*sys.path])
        yield str(path / "small_model.py")


@pytest.fixture(scope="module")
def profile(model: str) -> str:
    path = str(Path(model).with_name("profile.json"))
    assert main(["profile", f"{model}:build", "--num-microbatches", "4", "-o", path, "--quiet"]) == 0
    return path


@pytest.fixture(scope="module")
def plan(profile: str) -> str:
    path = str(Path(profile).with_name("plan.json"))
    argv = ["plan", "--profile", profile, "--num-stages", "2", "--num-microbatches", "4", "-o", path, "--quiet"]
    assert main(argv) == 0
    return path


def fails(capsys: pytest.CaptureFixture[str], status: int, words: str, *argv: str) -> None:
    """The call fails with one line on stderr, which has the words and a remedy."""
    try:
        got = main(argv)
    except SystemExit as exit_:
        got = int(exit_.code or 0)
    out, err = capsys.readouterr()
    assert (got, out) == (status, ""), err
    assert len(err.splitlines()) == 1, err
    assert words in err
    assert "remedy: " in err


def test_options_are_frozen() -> None:
    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert {n: sorted(c._option_string_actions) for n, c in commands.items()} == {
        n: sorted(o) for n, o in FROZEN.items()
    }


def test_profile_is_saved_and_shown(profile: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    saved = Profile.load(profile)
    assert saved.microbatch_size == 3
    assert {node.module for node in saved.nodes} >= {"0.0", "3.2"}
    assert main(["profile", f"{model}:build", "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("node,module,forward ms")


def test_profile_shows_every_node(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", f"{model}:build", "--nodes", "--budget-s", "0.1"]) == 0
    table = capsys.readouterr().out
    assert "By module" not in table and all(f"{i}_2" in table or f"{i}.2" in table for i in range(4))
    for format, sign in (("md", "| node"), ("csv", "node,module"), ("json", '"nodes"')):
        assert main(["profile", f"{model}:build", "--nodes", "--budget-s", "0.1", "--format", format]) == 0
        assert sign in capsys.readouterr().out
    fails(capsys, 2, "--budget-s", "profile", f"{model}:build", "--budget-s", "-1")


def test_plan_is_saved(plan: str) -> None:
    saved = Plan.load(plan)
    assert (saved.num_stages, saved.num_microbatches, saved.microbatch_size) == (2, 4, 3)
    assert len(saved.baselines) >= 3


def test_report_of_a_model_has_each_node_once(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["report", f"{model}:build", "--num-stages", "2", "--num-microbatches", "4"]
    assert main([*argv, "--format", "json", "--memory-limit", "1GiB"]) == 0
    data = json.loads(capsys.readouterr().out)
    nodes = [name for stage in data["stages"] for name in stage["nodes"]]
    assert len(nodes) == len(set(nodes)) == 12
    assert data["memory_limit_bytes"] == 2**30
    assert main([*argv, "--quiet", "-o", str(Path(model).with_suffix(".html"))]) == 0
    assert capsys.readouterr().out == ""
    assert Path(model).with_suffix(".html").read_text().startswith("<!DOCTYPE html>")


def test_more_micro_batches_than_samples_are_as_many_as_samples(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{model}:masked", "--num-stages", "2", "--num-microbatches", "9", "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["num_microbatches"], data["microbatch_size"]) == (4, 1)


def test_what_if_keeps_the_cuts(plan: str, capsys: pytest.CaptureFixture[str]) -> None:
    read = lambda *argv: (
        main(["report", "--plan", plan, "--format", "json", *argv]),
        json.loads(capsys.readouterr().out),
    )[1]
    base, more = read(), read("--num-microbatches", "8", "--link-gbps", "0.001", "--overlap", "0.5")
    assert [s["nodes"] for s in base["stages"]] == [s["nodes"] for s in more["stages"]]
    assert base["plan_hash"] == Plan.load(plan).plan_hash
    assert more["link"]["bytes_per_us"] == 0.125
    assert more["step_us"] > base["step_us"]
    assert more["baselines"] == []
    busy_us = 8 * sum(stage["forward_us"] + stage["backward_us"] for stage in more["stages"])
    assert more["bubble"] == pytest.approx(1 - busy_us / (2 * more["step_us"]))
    assert "lower bound" not in (main(["report", "--plan", plan, "--schedule", "gpipe"]), capsys.readouterr().out)[1]


def test_simulate_writes_what_the_suffix_says(plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("t.svg", "t.json", "t.html", "t.csv", "t.md"):
        assert main(["simulate", "--plan", plan, "-o", str(tmp_path / name), "--quiet"]) == 0
    ET.parse(tmp_path / "t.svg")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert "<svg" in (tmp_path / "t.html").read_text()
    capsys.readouterr()
    makespans = []
    for schedule in (None, "zb-h1"):
        asked = [] if schedule is None else ["--schedule", schedule]
        assert main(["simulate", "--plan", plan, "--format", "json", *asked]) == 0
        played = json.loads(capsys.readouterr().out)
        makespans.append(played["makespan_us"])
        assert played["makespan_us"] == autopipe.simulate(Plan.load(plan), schedule=schedule).makespan_us
        assert len(played["bubble"]) == 2
    assert makespans[0] != makespans[1]


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["python"] == sys.version.split()[0]
    assert "gloo" in found["backends"]


def test_wrong_calls(model: str, profile: str, plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    stages = ("--num-stages", "2")
    fails(capsys, 2, "frobnicate", "frobnicate")
    fails(capsys, 2, "required", "profile")
    fails(capsys, 2, "no model", "plan", *stages)
    fails(capsys, 2, "a model and a profile", "plan", f"{model}:build", "--profile", profile, *stages)
    fails(capsys, 2, "a plan and a model", "report", f"{model}:build", "--plan", plan)
    fails(capsys, 2, "no number of stages", "plan", "--profile", profile)
    fails(capsys, 2, "--num-stages with --plan", "report", "--plan", plan, *stages)
    fails(capsys, 2, "'0' is not a whole number", "plan", "--num-stages", "0")
    fails(capsys, 2, "'2' is not a share", "plan", "--profile", profile, *stages, "--overlap", "2")
    fails(capsys, 2, "'12 parsecs' is not a size", "plan", "--profile", profile, "--memory-limit", "12 parsecs")
    fails(capsys, 2, "'0' is not above 0", "plan", "--profile", profile, "--link-gbps", "0")
    fails(capsys, 2, "stages", "plan", "--profile", profile, "--num-stages", "99")
    fails(capsys, 2, "cannot read", "report", "--plan", str(tmp_path / "nothing.json"))
    fails(capsys, 2, "schema", "report", "--plan", profile)
    fails(capsys, 2, "cannot write", "report", "--plan", plan, "-o", str(tmp_path / "no" / "where.md"))
    fails(capsys, 2, "invalid choice: 'xml'", "report", "--plan", plan, "--format", "xml")


def test_wrong_models(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, 2, "package.module:factory or file.py:factory", "profile", "model")
    fails(capsys, 2, "no file 'nowhere.py'", "profile", "nowhere.py:build")
    fails(capsys, 2, "no module 'nowhere_at_all'", "profile", "nowhere_at_all.models:build")
    fails(capsys, 2, "it has build, masked, empty, broken, no_model", "profile", f"{model}:bild")
    fails(capsys, 2, "expected a factory", "profile", f"{model}:value")
    fails(capsys, 2, "returns (int, int)", "profile", f"{model}:no_model")
    fails(capsys, 2, "a batch of size 0", "profile", f"{model}:empty")
    fails(capsys, 2, "RuntimeError: no weights here", "profile", f"{model}:broken")


def test_debug_shows_the_traceback(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", f"{model}:broken", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "small_model.py" in err


def test_runs_as_a_program(plan: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "autopipe.cli", "report", "--plan", plan],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "step time" in done.stdout


def test_a_plan_may_stand_in_the_place_of_the_model(plan: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", plan]) == 0
    named = capsys.readouterr().out
    assert main(["simulate", "--plan", plan]) == 0
    assert capsys.readouterr().out == named
    assert main(["report", plan, "--num-microbatches", "8"]) == 0
    assert "8 micro-batches" in capsys.readouterr().out


def test_split_points_take_the_place_of_a_search(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["plan", "--profile", profile, "--num-stages", "3", "--split-points", "1, 3", "--format", "json"]
    assert main(call) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [s["first_module"].split(".")[0] for s in stages] == ["0", "1", "3"]
    fails(capsys, 2, "is not a list of module names", "plan", "--profile", profile, "--split-points", "1,,3")


def test_measured_needs_its_file_alone(plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, 2, "--measured and a model", "report", "--plan", plan, "--measured", "run.json")
    fails(capsys, 2, "--trace without --measured", "report", "--plan", plan, "--trace", "trace.json")
    fails(capsys, 2, "cannot read", "report", "--measured", str(tmp_path / "no.json"))


def test_an_interleaved_plan_is_played_with_other_micro_batches(
    profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "many.json"
    assert (
        main(["plan", "--profile", profile, "--num-stages", "4", "--num-microbatches", "4", "-o", str(path), "--quiet"])
        == 0
    )
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "schedule": "interleaved", "num_ranks": 2}))
    assert main(["report", "--plan", str(path), "--num-microbatches", "8", "--format", "json"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert 0 < more["bubble"] < 1
    assert main(["report", "--plan", str(path), "-o", str(tmp_path / "page.html"), "--quiet"]) == 0


def test_devices_take_the_place_of_a_number_of_stages(
    tmp_path: Path, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["plan", "--profile", profile, "--time-budget-s", "0.5", "--quiet", "--format", "json"]
    out = tmp_path / "searched.json"
    assert main([*given, "--num-devices", "2", "--global-batch", "16", "-o", str(out)]) == 0
    plan = json.loads(out.read_text())
    assert plan["num_stages"] * plan["data_parallel"] == 2 and len(plan["candidates"]) > 1
    assert plan["step_us"] == min(c["step_us"] for c in plan["candidates"]) >= plan["search_bound_us"] > 0
    assert main(["report", "--plan", str(out)]) == 0
    assert "ways to use the devices" in capsys.readouterr().out
    cluster = tmp_path / "cluster.json"
    node = {"count": 2, "devices": 2, "memory_bytes": 2**30}
    link = {"latency_us": 5, "gbps": 100}
    text = json.dumps(
        {"schema": "autopipe.cluster/1", "nodes": [node], "within_node": link, "between_nodes": {**link, "gbps": 1}}
    )
    cluster.write_text(text)
    assert main([*given, "--cluster", str(cluster), "--global-batch", "16", "-o", str(out)]) == 0
    assert json.loads(out.read_text())["memory_limit_bytes"] == 2**30
    fails(capsys, 2, "--link-gbps with --cluster", *given, "--cluster", str(cluster), "--link-gbps", "3")
    cluster.write_text(text.replace("gbps", "gpbs"))
    fails(capsys, 2, "the field 'gpbs'", *given, "--cluster", str(cluster))


def test_a_profile_is_scaled_and_a_plan_played_on_other_devices(
    model: str, profile: str, plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["profile", f"{model}:build", "--num-microbatches", "4", "--from", profile, "--quiet"]
    out = tmp_path / "scaled.json"
    assert main([*given, "--device", "h100", "--from-device", "cpu", "-o", str(out)]) == 0
    scaled = json.loads(out.read_text())
    assert scaled["device"] == "h100" and not any(node["measured"] for node in scaled["nodes"])
    fails(capsys, 2, "--from-device", *given, "--device", "h100")
    fails(capsys, 2, "--from with --device cpu", *given, "--device", "cpu")
    cluster = tmp_path / "fast.json"
    link = {"latency_us": 0, "gbps": 1e6}
    node = {"devices": 2, "speed": 2.0}
    cluster.write_text(json.dumps({"schema": "autopipe.cluster/1", "nodes": [node], "within_node": link}))
    assert main(["report", plan, "--cluster", str(cluster), "--format", "json"]) == 0
    played, before = json.loads(capsys.readouterr().out), json.loads(Path(plan).read_text())
    assert played["stages"][0]["forward_us"] == pytest.approx(before["stages"][0]["forward_us"] / 2)
    assert played["step_us"] < before["step_us"]
    fails(
        capsys,
        2,
        "--link-gbps with --plan and --cluster",
        "report",
        plan,
        "--cluster",
        str(cluster),
        "--link-gbps",
        "1",
    )
    cluster.write_text(cluster.read_text().replace('"speed": 2.0', '"device": "a100"'))
    fails(capsys, 2, "a device 'a100' in the cluster", "simulate", plan, "--cluster", str(cluster))


def test_seven_billion_parameters_are_planned_for_devices_that_are_not_here(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "dry_run_7b.py"
    arguments = ["--device", "h100", "--num-stages", "8", "--num-microbatches", "32", "--quiet"]
    assert main(["plan", f"{example}:build", *arguments, "-o", str(tmp_path / "plan.json")]) == 0
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.estimated and plan.num_stages == 8
    assert (
        sum(stage.param_bytes for stage in plan.stages) >= 2 * 6_738_415_616
    )  # bfloat16, and what is read by two stages
    assert all(stage.peak_bytes < 80e9 for stage in plan.stages)


def test_env_shows_the_variables_that_the_source_reads() -> None:
    source = [p for package in ("autopipe", "profiler") for p in (ROOT / package).rglob("*.py")]
    read = {
        node.value
        for path in source
        if path.name != "environment.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"AUTOPIPE_[A-Z_]+", node.value)
    }
    assert len(read) >= 4
    assert read == {name for name in VARIABLES if name.startswith("AUTOPIPE_")}
