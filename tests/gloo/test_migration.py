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


def _run_all(programs: list[str]) -> list[list[float]]:
    """The first makes the process group, in which the others run."""
    return [_run(code) for code in programs]


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


def test_the_programs_of_the_guides_train_as_a_plain_loop_does() -> None:
    torch_page, deepspeed_page = "migrate-torch-pipelining.md", "migrate-deepspeed.md"
    programs = [program(torch_page, "there"), program(torch_page, "here"), program(deepspeed_page, "here")]
    for ranks in run_ranks(_run_all, 2, programs):
        for losses in ranks:
            assert losses == pytest.approx(_plain(), rel=1e-5)
