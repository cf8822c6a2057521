"""Ranks that fail in one phase of a step, leave early, differ in version, or are slow.

The first are a small part of `benchmarks/durability faults`. The right rank is named on all others. What a user does
wrong is in `test_errors_on_every_rank.py`.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.gloo.durability import ran
from tests.gloo.launch import run_ranks
from tests.gloo.logs import kept_warnings

FAULTS = [
    {"world": 3, "rank": 2, "phase": "backward", "how": "raise", "shared_memory": True},
    {"world": 2, "rank": 1, "phase": "between steps", "how": "raise", "shared_memory": False},
    {"world": 4, "rank": 2, "phase": "data", "how": "raise", "shared_memory": True},
    {"world": 2, "rank": 0, "phase": "optimizer", "how": "kill", "shared_memory": False},
    {"world": 3, "rank": 1, "phase": "forward", "how": "kill", "shared_memory": True},
    {"world": 3, "rank": 0, "phase": "forward", "how": "stop", "shared_memory": True},
    {"world": 2, "rank": 1, "phase": "loss", "how": "slow", "shared_memory": False},
    {"world": 2, "rank": 1, "phase": "forward", "how": "hold the lock", "shared_memory": True},
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came of each fault, in the order of `FAULTS`."""
    return ran("faults", "--only", json.dumps(FAULTS), folder=tmp_path_factory.mktemp("faults"))["faults"]


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[" ".join(map(str, f.values())) for f in FAULTS])
def test_the_right_rank_is_named_in_time(outcomes: list[dict[str, Any]], number: int) -> None:
    outcome = outcomes[number]
    assert outcome["fault"] == FAULTS[number]
    assert not outcome["wrong"], outcome["wrong"]
    assert outcome["orphans"] == 0


def _train(what: str) -> str:
    import autopipe

    rank = int(os.environ["RANK"])
    if what == "another torch" and rank == 1:
        torch.__version__ = torch.torch_version.TorchVersion("1.0")
    x, target = torch.randn(8, 4), torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    try:
        with autopipe.pipeline(model, (x,), example_target=target, loss_fn=F.mse_loss, num_stages=2) as engine:
            for _ in range(3 if what == "fewer steps" and rank == 1 else 6):
                engine.train_batch(x, target=target)
    except autopipe.AutopipeError as error:
        return str(error)
    return "finished"


def test_a_rank_that_ends_its_training_earlier_is_named() -> None:
    first, second = run_ranks(_train, 2, "fewer steps", timeout_s=60)
    assert second == "finished"
    assert "rank 1" in first
    assert "it has left" in first


def test_other_versions_on_a_rank_are_named_on_all() -> None:
    for message in run_ranks(_train, 2, "another torch", timeout_s=60):
        assert "rank 1 has torch 1.0" in message


class _Slow(torch.autograd.Function):
    """The identity, which takes `seconds` in every forward."""

    seconds = 0.0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(_Slow.seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _SlowLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return _Slow.apply(self.linear(x))


def _slow_after_planning() -> list[str]:
    """What rank 0 warns of where stage 1 takes much longer than it was measured."""
    import autopipe
    from autopipe.engine.step import step_stats

    step_stats.PACE_EVERY_S = 0.2
    warnings = kept_warnings()
    x = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4), _SlowLayer())
    with autopipe.pipeline(
        model, loss_fn=F.mse_loss, num_stages=2, num_microbatches=2, schedule="1f1b", split_points=["1"]
    ) as engine:
        engine.train_batch(x, target=x)
        _Slow.seconds = 0.03
        for _ in range(30):
            engine.train_batch(x, target=x)
    return warnings


def test_a_stage_that_is_slower_than_its_plan_is_warned_about() -> None:
    first, second = run_ranks(_slow_after_planning, 2, timeout_s=90, measured=True)
    assert not second
    assert any("stage 1 on rank 1 is slow" in w and "a micro-batch where its plan" in w for w in first), first
