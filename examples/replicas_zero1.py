# torchrun --nproc-per-node 4 examples/replicas_zero1.py
"""Two replicas of a pipeline of two stages: each replica reads its own share of the data, Adam's state is sharded over
them (ZeRO-1).

With `shard_batch=False` and `engine.sampler` every rank loads only what its replica trains on. Without both, every rank
passes the whole batch, and the engine takes each replica's share of it.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autopipe


def network(width: int = 128, layers: int = 6) -> nn.Module:
    """A plain multilayer perceptron with layer norm: (batch, 8) to (batch, 1)."""
    hidden = [m for _ in range(layers) for m in (nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(nn.Linear(8, width), *hidden, nn.Linear(width, 1))


def samples(count: int) -> TensorDataset:
    """Points of [-1, 1]⁸ and a smooth function of them."""
    x = 2 * torch.rand(count, 8, generator=torch.Generator().manual_seed(0)) - 1
    return TensorDataset(x, torch.sin(3 * x[:, :1]) * x[:, 1:2] + x[:, 2:3] ** 2)


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """The model and an example batch, for the command line: `autopipe report examples/replicas_zero1.py:build`."""
    torch.manual_seed(0)
    return network(), (samples(64).tensors[0],)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4096)
    options = parser.parse_args()

    torch.manual_seed(0)
    engine = autopipe.pipeline(
        network(),
        loss_fn=F.mse_loss,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        num_microbatches=4,
        num_stages=2,
        zero_stage=1,
        shard_batch=False,
    )
    dataset = samples(options.samples)
    sampler = engine.sampler(dataset)
    loader = DataLoader(dataset, batch_size=64, sampler=sampler)
    for epoch in range(1, options.epochs + 1):
        sampler.set_epoch(epoch)
        losses = [engine.train_batch(x.to(engine.device), target=y.to(engine.device)) for x, y in loader]
        if engine.is_first_rank:
            print(f"epoch {epoch}  squared error {torch.stack(losses).mean():.4f}", flush=True)
    report = engine.report()
    if engine.is_first_rank:
        print("\n" + report)
    engine.close()


if __name__ == "__main__":
    main()
