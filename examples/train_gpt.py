# torchrun --nproc-per-node 2 examples/train_gpt.py
"""A byte-level GPT with tied embeddings learns the source files of Python's standard library, as a pipeline over all
processes.

The model is ordinary PyTorch code. The pipeline is the one call of `autopipe.pipeline` in `main`.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopipe

VOCAB, CONTEXT = 256, 128


class Block(nn.Module):
    """A pre-norm transformer block: (batch, time, width) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, time_, width = x.shape
        q, k, v = (
            y.view(batch, time_, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, time_, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes in, the mean cross entropy of the next byte out, in nats; the head's weight is the embedding's."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.wte.weight
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def standard_library() -> Tensor:
    """The bytes of the standard library's top-level modules, as int64."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()


def batch_of(data: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows and the bytes that follow: two tensors of (size, CONTEXT). Equal on every rank for an equal
    generator."""
    starts = torch.randint(len(data) - CONTEXT - 1, (size,), generator=generator)
    windows = torch.stack([data[s : s + CONTEXT + 1] for s in starts])
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def build() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The model and an example batch, for the command line: `autopipe report examples/train_gpt.py:build`."""
    torch.manual_seed(0)
    return GPT(), batch_of(standard_library(), 32, torch.Generator().manual_seed(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--microbatches", type=int, default=8)
    options = parser.parse_args()

    torch.manual_seed(0)
    model, data, generator = GPT(), standard_library(), torch.Generator().manual_seed(0)
    engine = autopipe.pipeline(
        model, optimizer=partial(torch.optim.AdamW, lr=3e-3), data_parallel=1, num_microbatches=options.microbatches
    )

    is_first = engine.stage == 0
    started = time.perf_counter()
    for step in range(options.steps):
        ids, labels = batch_of(data, options.batch, generator)
        loss = engine.train_batch(ids.to(engine.device), labels.to(engine.device))
        if is_first and (step % 10 == 0 or step == options.steps - 1):
            seconds, started = time.perf_counter() - started, time.perf_counter()
            per_step = seconds / 10 if step else seconds
            print(f"step {step:4d}  loss {loss:.3f} nats per byte  {1e3 * per_step:6.0f} ms a step", flush=True)
    report = engine.report()
    if is_first:
        print("\n" + report)
    engine.close()


if __name__ == "__main__":
    main()
