"""Exported torch stages train under torch's own schedules to the plain model's gradients: skips passed on, ties
summed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B

import profiler
from autopipe.capture import Captured, capture
from autopipe.cli import main
from autopipe.cli.models import Example, load_example
from autopipe.engine.step.microbatch import split
from autopipe.export import pipeline_stage, sum_tied_gradients, torch_stages
from autopipe.partition import partition
from autopipe.plan import Plan
from tests.gloo.launch import run_ranks
from tests.gloo.plain import relative_error

EXAMPLES = Path(__file__).parents[2] / "examples"
MICROBATCHES = 4
TOLERANCE = 1e-5


def _captured(name: str) -> tuple[Example, Captured]:
    torch.manual_seed(0)
    example = load_example(f"{EXAMPLES / name}:build")
    first = split(example.args, example.kwargs, None, MICROBATCHES)[0]
    captured = capture(example.model, first.args, first.kwargs, check=False)
    return example, captured.loss_only() if captured.loss is not None else captured


def _plan(name: str, num_stages: int) -> Plan:
    example, captured = _captured(name)
    first = split(example.args, example.kwargs, None, MICROBATCHES)[0]
    measured = profiler.profile(
        captured.graph_module,
        captured.flatten(first.args, first.kwargs),
        names=captured.names,
        graph_hash=captured.graph_hash,
        progress=False,
    )
    return partition(measured, num_stages=num_stages, num_microbatches=MICROBATCHES)


def _loss(output: Any, target: Any) -> Any:
    return output.sum() if output.numel() == 1 else (output * torch.cos(output.detach() + 1)).mean()


def _train(name: str, plan: Plan) -> dict[str, Any]:
    """One step under torch's schedule; the largest relative error of this rank's gradients against the plain
    model's."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    example, captured = _captured(name)
    for part in split(example.args, example.kwargs, None, MICROBATCHES):
        output = example.model(*part.args, **part.kwargs)
        (_loss(output, None) / MICROBATCHES).backward()
    plain = {n: p.grad.clone() for n, p in example.model.named_parameters() if p.grad is not None}
    example.model.zero_grad(set_to_none=True)
    mine = torch_stages(captured, plan)[rank::ranks]
    made = [pipeline_stage(stage, "cpu") for stage in mine]
    schedule = (
        Schedule1F1B(made[0], MICROBATCHES, loss_fn=_loss)
        if len(made) == 1
        else ScheduleInterleaved1F1B(made, MICROBATCHES, loss_fn=_loss)
    )
    target = torch.zeros(MICROBATCHES) if mine[-1].is_last else None
    batch = captured.flatten(example.args, example.kwargs) if rank == 0 else ()
    schedule.step(*batch, target=target, losses=[])
    sum_tied_gradients(mine)
    errors = {
        captured.names.get(n, n): relative_error(p.grad, plain[captured.names.get(n, n)])
        for stage in mine
        for n, p in stage.module.named_parameters()
        if p.grad is not None
    }
    dist.destroy_process_group()
    return {"errors": errors, "all": sorted(plain)}


@pytest.mark.parametrize("name", ["train_gpt.py", "unet_skips.py"])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_trains_equal_under_torch_schedules(name: str, num_stages: int) -> None:
    plan = _plan(name, num_stages)
    if name == "unet_skips.py" and num_stages == 4:
        assert any(t.target > t.source + 1 for t in plan.transfers), "a skip is to be passed on"
    if name == "train_gpt.py":
        assert any(len(set(stages)) > 1 for stages in plan.ties.values()), "a tie is to be summed"
    results = run_ranks(_train, 2, name, plan)
    seen = {n for result in results for n in result["errors"]}
    assert sorted(seen) == results[0]["all"]
    assert max(e for result in results for e in result["errors"].values()) < TOLERANCE


def test_exported_program_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = f"{EXAMPLES / 'unet_skips.py'}:build"
    plan, program = str(tmp_path / "plan.json"), str(tmp_path / "stages.py")
    call = ["plan", model, "--num-stages", "2", "--num-microbatches", "4", "-o", plan, "--quiet"]
    assert main(call) == 0
    assert main(["export", plan, "--to", "torch", "--model", model, "-o", program, "--quiet"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("loss ")
