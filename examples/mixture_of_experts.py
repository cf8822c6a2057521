# torchrun --nproc-per-node 2 examples/mixture_of_experts.py
"""A transformer whose blocks send each token to its two best experts: how many tokens an expert gets depends on the
data.

Such a layer has no fixed graph. autopipe keeps it whole and cuts the model around it; `autopipe.capture` says which
modules were kept and why.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopipe

VOCAB, CONTEXT = 64, 32


class Experts(nn.Module):
    """Each token goes to its `chosen` best experts, weighted by the router: (tokens, width) to the same."""

    def __init__(self, width: int, num_experts: int, chosen: int = 2) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, choice = self.router(x).softmax(dim=-1).topk(self.chosen, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, rank = torch.where(choice == index)
            if len(token) > 0:  # depends on the data
                out = out.index_add(0, token, expert(x[token]) * weights[token, rank, None])
        return out


class Block(nn.Module):
    """Attention, then experts: (batch, time, width) to the same."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        self.mixture = Experts(width, num_experts)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mixture(self.norm2(x).flatten(0, 1)).view_as(x)


class MixtureOfExperts(nn.Module):
    """Token ids, (batch, time), to the mean cross entropy of the next one."""

    def __init__(self, width: int = 64, layers: int = 4, num_experts: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, num_experts) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        for block in self.blocks:
            x = block(x, mask)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def sums(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences in which each number is the sum of the two before, modulo VOCAB: ids and labels of (count, CONTEXT)."""
    numbers = torch.randint(VOCAB, (count, 2), generator=generator)
    for _ in range(CONTEXT - 1):
        numbers = torch.cat([numbers, (numbers[:, -1:] + numbers[:, -2:-1]) % VOCAB], dim=1)
    return numbers[:, :-1].contiguous(), numbers[:, 1:].contiguous()


def build() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The model and an example batch, for the command line: `autopipe report examples/mixture_of_experts.py:build`."""
    torch.manual_seed(0)
    return MixtureOfExperts(), sums(32, torch.Generator().manual_seed(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = MixtureOfExperts()
    kept_whole = autopipe.capture(model, sums(8, generator)).report()
    engine = autopipe.pipeline(
        model, optimizer=partial(torch.optim.AdamW, lr=3e-3), data_parallel=1, num_microbatches=4
    )
    if engine.is_first_rank:
        print(kept_whole, flush=True)
    for step in range(1, options.steps + 1):
        ids, labels = sums(64, generator)
        loss = engine.train_batch(ids.to(engine.device), labels.to(engine.device))
        if engine.is_first_rank and (step % 25 == 0 or step == options.steps):
            print(f"step {step:4d}  loss {loss:.3f}", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
