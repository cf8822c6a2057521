"""The Python of README.md and docs/*.md runs as it stands, on three ranks, with the names that the words around it
suppose."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import autopipe
from examples.train_gpt import GPT
from tests.gloo.launch import run_in_turn

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = r"<!-- (?:file|program): [^\n]* -->\n```python\n"  # run by docs/run_commands.py and test_migration.py
EXAMPLE = ROOT / "examples" / "transformers_gpt2.py"


class Model(nn.Module):
    """The modules that the user guide names, in a row; gives its loss where it has the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.encoder = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.wte, self.head, self.loss_head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.loss_head(self.head(self.wte(self.encoder(self.patch_embed(input_ids)))))
        return x if labels is None else F.cross_entropy(x, labels)


def fragments() -> dict[str, str]:
    """The blocks of Python that are no files and no programs of their own, by page and number."""
    found = {}
    for page in PAGES:
        text = re.sub(MARKED + r".*?```", "", page.read_text(), flags=re.DOTALL)
        for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)):
            found[f"{page.name}, block {i}"] = code
    return {where: code for where, code in found.items() if "GPT2LMHeadModel(" not in code}


def _run(where: str, code: str, folder: str) -> None:
    os.chdir(folder)
    torch.manual_seed(0)
    model, x, labels = Model(), torch.randn(24, 8), torch.randint(8, (24,))
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    given = autopipe.pipeline(Model(), optimizer=adamw, num_microbatches=6)
    linear = torch.fx.symbolic_trace(nn.Linear(8, 8))
    names: dict[str, Any] = {
        "torch": torch,
        "partial": partial,
        "autopipe": autopipe,
        "GPT": GPT,
        "model": model,
        "engine": given,
        "adamw": adamw,
        "batch": x,
        "ids": x,
        "labels": labels,
        "loader": [(x, labels)] * 3,
        "validation_loader": [(x, labels)],
        "graph_module": linear,
        "args": (x,),
        "group": dist.group.WORLD,
    }
    torch.save(model.state_dict(), f"rank{dist.get_rank()}.pt")
    dist.barrier()
    code = code.replace('"model.safetensors"', f'"rank{dist.get_rank()}.pt"')
    exec(compile(code, f"<{where}>", "exec"), names)
    if names["engine"] is not given and names["model"] is model and "train_batch" not in code:
        assert names["engine"].train_batch(x, labels).isfinite(), where


def test_fragments_run(tmp_path: Path) -> None:
    assert len(fragments()) >= 7
    run_in_turn(3, [(_run, (where, code, str(tmp_path))) for where, code in fragments().items()])


def test_the_readmes_transformers_model_is_the_example() -> None:
    (code,) = re.findall(r"```python\n(model = GPT2.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert code in EXAMPLE.read_text()
    assert len(code.splitlines()) <= 10
