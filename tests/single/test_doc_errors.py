"""The messages in the user guide's table of errors are those that users see."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
import profiler

GUIDE = (Path(__file__).parents[2] / "docs" / "user-guide.md").read_text()
SHOWN_ELSEWHERE = {
    "EngineError: rank 0 calls …, rank 1 calls …": "needs two ranks: tests/gloo/test_errors_on_every_rank.py"
}


class Model(nn.Module):
    """Two layers and a loss; `how` brings in the faults."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.first, self.second, self.how = nn.Linear(8, 8), nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        match self.how:
            case "reads" if x.numpy().sum() > 0:
                return y.sum()
            case "branches" if (x.sum() > 0) and x.sum().item() > 0:
                y = y + 1
            case "longer":
                y = y.tanh()
            case "no loss":
                return self.second(y)
        return self.second(y).square().mean()


def _branch_changes(engine: Any) -> None:
    engine.train_batch(torch.ones(8, 8))
    engine.train_batch(-torch.ones(8, 8))


def _plan(num_stages: int = 1) -> autopipe.Plan:
    captured = autopipe.capture(Model(), (torch.ones(8, 8),))
    measured = profiler.profile(captured.graph_module, captured.flatten((torch.ones(8, 8),), {}), progress=False)
    return autopipe.partition(measured, num_stages=num_stages, num_microbatches=1)


class FailsOnRealTensors(torch.autograd.Function):
    """Its shapes can be told, its values not be computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            raise ValueError("no values")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Failing(Model):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(FailsOnRealTensors.apply(x))


CASES: list[Callable[[], Any]] = [
    lambda: autopipe.pipeline(Model(), num_stages=4, schedule="1f1b", data_parallel=1),
    lambda: autopipe.pipeline(Model("reads"), (torch.ones(8, 8),)),
    lambda: _branch_changes(autopipe.pipeline(Model("branches"), num_microbatches=1)),
    lambda: autopipe.pipeline(Model("no loss")).train_batch(torch.ones(8, 8)),
    lambda: autopipe.pipeline(Failing(), (torch.ones(8, 8),), self_check=False),
    lambda: autopipe.pipeline(Model(), (torch.ones(8, 8),), memory_limit=10),
    lambda: autopipe.Cluster.from_json({"schema": "autopipe.cluster/1", "nodes": "two"}),
    lambda: autopipe.pipeline(Model("longer"), (torch.ones(8, 8),), plan=_plan()),
    lambda: autopipe.pipeline(Model(), plan=_plan(2)),
    lambda: autopipe.pipeline(Model(), (torch.ones(8, 8),), optimizer=partial(torch.optim.SGD, lr=0.1)).load_checkpoint(
        "nothing-here"
    ),
]


def rows() -> list[str]:
    """The first column of the table of errors."""
    table = GUIDE.partition("## Troubleshooting by error name")[2]
    return re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)


def _said(case: Callable[[], Any]) -> str:
    with pytest.raises(autopipe.AutopipeError) as raised:
        case()
    return f"{type(raised.value).__name__}: {raised.value}"


def test_every_message_of_the_table_is_seen() -> None:
    said = [_said(case) for case in CASES]
    for row in rows():
        if row not in SHOWN_ELSEWHERE:
            pattern = re.sub(r"\d+", r"\\d+", re.escape(row)).replace("…", ".*").replace("processes", "process(es)?")
            assert any(re.search(pattern, message) for message in said), (row, said)
    assert rows() and SHOWN_ELSEWHERE.keys() <= set(rows())
