# torchrun --nproc-per-node 3 examples/unet_skips.py
"""A small U-Net that removes noise from pictures: its skip connections pass over stages, straight from producer to
reader.

`torch.distributed.pipelining` refuses such a model; nothing in it is written for a pipeline.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopipe


def convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3 × 3 convolutions with group norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """(batch, 1, size, size) to the same; the first features are read again at the very end."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(depth)]
        self.down = nn.ModuleList(convolutions(a, b) for a, b in zip([1, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(
            convolutions(a + b, b) for a, b in zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True)
        )
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], dim=1))
        return self.last(x)


def pictures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random plane waves, (count, 1, size, size)."""
    angle, frequency, phase = torch.rand(3, count, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    wave = torch.sin(
        2 * math.pi * (1 + 4 * frequency) * (x * torch.cos(math.pi * angle) + y * torch.sin(math.pi * angle))
        + 6 * phase
    )
    return wave[:, None]


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """The model and an example batch, for the command line: `autopipe report examples/unet_skips.py:build`."""
    torch.manual_seed(0)
    return UNet(), (torch.randn(24, 1, 32, 32),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    engine = autopipe.pipeline(
        UNet(), loss_fn=F.mse_loss, optimizer=partial(torch.optim.Adam, lr=2e-3), data_parallel=1, num_microbatches=6
    )
    for step in range(options.steps):
        clean = pictures(24, 32, generator)
        noisy = clean + 0.5 * torch.randn(clean.shape, generator=generator)
        loss = engine.train_batch(noisy.to(engine.device), target=clean.to(engine.device))
        if engine.stage == 0 and step % 10 == 9:
            print(f"step {step + 1:3d}  squared error {loss:.4f}", flush=True)
    report = engine.report()
    if engine.stage == 0:
        print("\ntensors that cross between stages:")
        for transfer in engine.plan.transfers:
            print(f"  stage {transfer.source} to {transfer.target}: {', '.join(transfer.nodes)}")
        print("\n" + report)
    engine.close()


if __name__ == "__main__":
    main()
