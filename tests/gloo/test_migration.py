"""The programs of the migration guides run as they stand, and give the losses of a plain run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.gloo.launch import run_ranks

DOCS = Path(__file__).parents[2] / "docs"


def program(page: str, side: str) -> str:
    """The code of one side of a page."""
    text = (DOCS / page).read_text()
    return re.findall(rf"<!-- program: {side} -->\n```python\n(.*?)```", text, flags=re.DOTALL)[0]


def _run(code: str) -> list[float]:
    names: dict[str, Any] = {}
    exec(compile(code, "<guide>", "exec"), names)
    return list(names["losses"])


def _plain() -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        x, y = torch.randn(16, 8, generator=generator), torch.randn(16, 8, generator=generator)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("page", "side"),
    [
        ("migrate-deepspeed.md", "here"),
        ("migrate-torch-pipelining.md", "here"),
        ("migrate-torch-pipelining.md", "there"),
    ],
)
def test_the_programs_of_the_guides_train_as_a_plain_loop_does(page: str, side: str) -> None:
    for losses in run_ranks(_run, 2, program(page, side)):
        assert losses == pytest.approx(_plain(), rel=1e-5)
