"""`autopipe verify`: the examples pass, and a gradient that is wrong on one rank alone is found and named."""

from __future__ import annotations

import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopipe.cli import main
from autopipe.cli.models import load_parts
from autopipe.errors import ConfigError, EngineError
from autopipe.verify import verification_report, verify
from autopipe.verify.processes import run_processes

EXAMPLES = Path(__file__).parents[2] / "examples"


class RankScale(torch.autograd.Function):
    """The identity, whose gradient is scaled on rank 1 of a launch: a planted fault."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (1.001 if os.environ.get("RANK") == "1" else 1.0)


class Faulty(nn.Module):
    """Four layers; the gradient of the third is wrong where rank 1 computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x).tanh()
            if i == 2:
                x = RankScale.apply(x)
        return x.square().mean()


def faulty() -> tuple[nn.Module, tuple[Tensor], dict[str, Any]]:
    return Faulty(), (torch.randn(8, 8),), {}


class Noisy(nn.Module):
    """Dropout between batch norms, and no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"out": x}


def noisy() -> tuple[nn.Module, tuple[Tensor], dict[str, Any]]:
    return Noisy(), (torch.randn(8, 8),), {}


WITHOUT_LOSS = {"unet_skips.py", "resnet.py", "replicas_zero1.py", "plain_loop.py", "train_and_evaluate.py"}


@pytest.mark.parametrize(
    ("example", "num_stages"),
    [
        ("train_gpt.py", 2),
        ("unet_skips.py", 3),
        ("resnet.py", 2),
        ("encoder_decoder.py", 2),
        ("mixture_of_experts.py", 2),
        ("replicas_zero1.py", 2),
        ("plain_loop.py", 2),
        ("train_and_evaluate.py", 2),
        ("convert_gpt2.py", 2),
    ],
)
def test_examples_pass(example: str, num_stages: int) -> None:
    build = functools.partial(load_parts, f"{EXAMPLES / example}:build")
    found = verify(build, num_stages=num_stages, num_microbatches=4)
    assert found.equal, verification_report(found)
    assert max(d.error for d in found.differences) < 1e-6
    assert found.surrogate == (example in WITHOUT_LOSS)


def deep() -> tuple[nn.Module, tuple[Tensor], dict[str, Any]]:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(16))), (torch.randn(64, 64),), {}


def test_schedules_with_several_stages_a_process_are_verified() -> None:
    found = verify(deep, num_stages=4, num_microbatches=4, schedule="interleaved")
    assert found.equal, verification_report(found)
    assert found.num_stages == 4
    assert {d.stage for d in found.differences if d.kind == "gradient"} == {0, 1, 2, 3}
    with pytest.raises(ConfigError, match=r"3 stages under interleaved.*a multiple of 2.*4 stages"):
        verify(noisy, num_stages=3, num_microbatches=4, schedule="interleaved")


def test_dropout_is_off_and_running_statistics_are_compared() -> None:
    found = verify(noisy, num_stages=2, num_microbatches=2)
    assert found.equal, verification_report(found)
    assert found.without_dropout and found.surrogate
    compared = {d.name for d in found.differences if d.kind == "buffer"}
    assert {f"layers.{i}.1.{n}" for i in range(3) for n in ("running_mean", "running_var")} <= compared
    assert "dropout off" in verification_report(found)


def test_a_planted_wrong_gradient_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "tests.gloo.test_verify:faulty", "--num-stages", "2", "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    wrong = {d["name"] for d in found["differences"] if d["error"] > d["tolerance"]}
    assert "layers.2.weight" in wrong
    assert not wrong & {"loss", "layers.3.weight", "layers.3.bias"}
    assert found["differences"][0]["name"] in wrong, "the worst comes first"


def _die(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    time.sleep(60)


def test_a_dead_and_a_late_process_are_errors() -> None:
    with pytest.raises(EngineError, match="rank 1 died with exit code 3"):
        run_processes(_die, 2, timeout_s=60)
    with pytest.raises(EngineError, match="no result of rank 0 after 1 s"):
        run_processes(_die, 1, timeout_s=1)
