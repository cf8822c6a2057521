"""Mistakes of the user, and a stage that raises or dies: one named error with its remedy on every rank, soon.

Faults in every phase of a step are in `test_faulty_ranks.py`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.gloo.launch import run_ranks, try_ranks


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Counting(Small):
    """Computes something else at every call: no graph can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Fails(nn.Module):
    """Kept whole because it reads a value; raises, or ends its process, where that value is large."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().max()) > 1e3:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("values out of range")
        return self.inner(x)


def _bad_input(what: str) -> tuple[str, str, float]:
    """Makes one mistake; returns the error's type, its message, and the seconds that it took."""
    import autopipe

    started = time.monotonic()
    model: nn.Module = Small()
    x, target = torch.randn(8, 4), torch.randn(8, 4)
    try:
        if what == "cannot be captured":
            autopipe.pipeline(Counting(), loss_fn=F.mse_loss).train_batch(x, target=target)
        elif what == "wrong device":
            autopipe.pipeline(model, loss_fn=F.mse_loss).train_batch(x.to("meta"), target=target)
        elif what == "wrong device later":
            engine = autopipe.pipeline(model, (x,), example_target=target, loss_fn=F.mse_loss)
            engine.train_batch(x, target=target.to("meta"))
        elif what == "too many stages":
            num_stages = int(os.environ["WORLD_SIZE"])
            autopipe.pipeline(nn.Linear(4, 4), loss_fn=F.mse_loss, num_stages=num_stages).train_batch(x, target=target)
        elif what == "another model's plan":
            autopipe.pipeline(
                nn.Sequential(nn.Linear(4, 4), nn.Tanh(), model), plan=_plan_of(model), loss_fn=F.mse_loss
            ).train_batch(x, target=target)
        elif what == "no loss":
            autopipe.pipeline(model).train_batch(x)
        elif what == "empty batch":
            autopipe.pipeline(model, loss_fn=F.mse_loss).train_batch(x[:0], target=target[:0])
        elif what == "different batches":
            rank = int(os.environ["RANK"])
            autopipe.pipeline(model, (x,), example_target=target, loss_fn=F.mse_loss).train_batch(
                x[rank:], target=target[rank:]
            )
        elif what == "before the first batch":
            autopipe.pipeline(model, loss_fn=F.mse_loss).state_dict()
        elif what == "loss without parameters":
            autopipe.pipeline(model.requires_grad_(False), loss_fn=F.mse_loss).train_batch(x, target=target)
    except autopipe.AutopipeError as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", time.monotonic() - started


def _plan_of(model: nn.Module) -> Any:
    import autopipe
    import profiler

    num_stages = int(os.environ["WORLD_SIZE"])
    captured = autopipe.capture(model, (torch.randn(2, 4),), loss_fn=F.mse_loss, target=torch.randn(2, 4)).loss_only()
    profile = profiler.profile(
        captured.graph_module, [torch.randn(2, 4), torch.randn(2, 4)], graph_hash=captured.graph_hash
    )
    return autopipe.partition(profile, num_stages=num_stages)


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ("cannot be captured", "CaptureError", "attribute 'calls'"),
        ("wrong device", "ConfigError", "device meta"),
        ("wrong device later", "ConfigError", "device meta"),
        ("too many stages", "PartitionError", "at most 2 processes"),
        ("another model's plan", "PlanError", "plan this model with"),
        ("no loss", "CaptureError", "loss_fn="),
        ("empty batch", "ConfigError", "size 0"),
        ("different batches", "EngineError", "same batch"),
        ("before the first batch", "EngineError", "example_args"),
        ("loss without parameters", "CaptureError", "requires_grad"),
    ],
)
def test_bad_input_is_one_named_error_on_every_rank(what: str, error: str, says: str) -> None:
    num_ranks = 3 if what == "too many stages" else 2
    for name, message, seconds in run_ranks(_bad_input, num_ranks, what, timeout_s=60):
        assert name == error, message
        assert says in message
        assert "remedy" in message
        assert seconds < 10


def _fail_in_stage(how: str, mark: str) -> str:
    import autopipe

    model = nn.Sequential(nn.Linear(4, 4), Fails(how), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
    x, target = torch.randn(8, 4), torch.randn(8, 4)
    engine = autopipe.pipeline(
        model,
        (x,),
        example_target=target,
        loss_fn=F.mse_loss,
        num_microbatches=4,
        split_points=["1"] if int(os.environ["WORLD_SIZE"]) == 2 else ["1", "2"],
    )
    engine.train_batch(x, target=target)
    x[6:] = 1e6
    Path(mark).touch()
    try:
        engine.train_batch(x, target=target)
    except autopipe.EngineError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_an_exception_in_a_stage_is_raised_on_every_rank_with_its_place(num_ranks: int, tmp_path: Path) -> None:
    for message in run_ranks(_fail_in_stage, num_ranks, "raise", str(tmp_path / "mark"), timeout_s=60):
        assert "stage 1 on rank 1, forward of micro-batch 3: ValueError: values out of range" in message
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 15


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    results = try_ranks(_fail_in_stage, 3, "kill", str(tmp_path / "mark"), timeout_s=60)
    assert results[1] == ("died", -signal.SIGKILL)
    for rank in (0, 2):
        kind, message = results[rank]
        assert kind == "ok", message
        assert "died without a word" in message
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 20
