# torchrun --nproc-per-node 2 examples/convert_gpt2.py
"""Trains a GPT-2 in a pipeline, converts its checkpoint to a folder that transformers reads, and compares what both
say.

The conversion is `autopipe convert CHECKPOINTS FOLDER`, here called from Python. Needs `pip install
'torch-autopipe[hf]'`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import autopipe
from autopipe.cli import main as autopipe_command

CONFIG = GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=256, n_positions=64, bos_token_id=0, eos_token_id=0)


def ids_of(seed: int) -> Tensor:
    """Bytes that repeat themselves: (16, 64)."""
    return torch.randint(256, (16, 8), generator=torch.Generator().manual_seed(seed)).repeat(1, 8)


def build() -> tuple[nn.Module, tuple[()], dict[str, Tensor]]:
    """The model and an example batch, for the command line: `autopipe report examples/convert_gpt2.py:build`."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(CONFIG), (), {"input_ids": ids_of(0), "labels": ids_of(0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    launch = f"convert_gpt2-{os.getppid()}"  # the processes of one launch share their parent
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / launch)
    options = parser.parse_args()

    torch.manual_seed(0)
    with autopipe.pipeline(GPT2LMHeadModel(CONFIG), optimizer=partial(torch.optim.AdamW, lr=1e-3)) as engine:
        for step in range(options.steps):
            ids = ids_of(step).to(engine.device)
            loss = engine.train_batch(input_ids=ids, labels=ids)
        engine.save_checkpoint(options.folder / "checkpoints", keep=1)
        logits = engine.predict(input_ids=ids)["logits"].cpu()
        if not engine.is_first_rank:
            return
    status = autopipe_command(["convert", str(options.folder / "checkpoints"), str(options.folder / "hub")])
    CONFIG.save_pretrained(options.folder / "hub")
    plain = GPT2LMHeadModel.from_pretrained(options.folder / "hub").eval()
    difference = (plain(input_ids=ids.cpu()).logits - logits).abs().max().item()
    print(f"loss {loss:.3f}; autopipe convert: {status}; logits of transformers differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
