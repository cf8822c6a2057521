# torchrun --nproc-per-node 2 examples/resnet.py
"""A residual network with batch norm learns to tell drawn shapes apart; accuracy is measured on pictures that it never
saw.

Running statistics are those of a plain loop over the micro-batches, and evaluation uses them.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopipe

SHAPES = ("disc", "square", "diamond", "cross")
SIZE = 24


class Residual(nn.Module):
    """Two 3 × 3 convolutions with batch norm beside a shortcut: (batch, inputs, h, w) to (batch, outputs, h / stride, w
    / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """(batch, 1, SIZE, SIZE) to a score for each of SHAPES."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            Residual(width, width, 1),
            Residual(width, width, 1),
            Residual(width, 2 * width, 2),
            Residual(2 * width, 2 * width, 1),
            Residual(2 * width, 4 * width, 2),
        )
        self.head = nn.Linear(4 * width, len(SHAPES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def drawn(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shapes of random place and size under noise, (count, 1, SIZE, SIZE), and the index of each in SHAPES,
    (count,)."""
    kind = torch.randint(len(SHAPES), (count, 1, 1), generator=generator)
    place = torch.rand(2, count, 1, 1, generator=generator) * 0.4 + 0.3
    radius = torch.rand(count, 1, 1, generator=generator) * 0.1 + 0.15
    y, x = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="ij")
    dy, dx = (y - place[0]).abs(), (x - place[1]).abs()
    inside = torch.stack(
        [
            dx**2 + dy**2 < radius**2,
            torch.maximum(dx, dy) < 0.85 * radius,
            dx + dy < 1.2 * radius,
            (torch.minimum(dx, dy) < 0.4 * radius) & (torch.maximum(dx, dy) < radius),
        ]
    )
    picture = torch.gather(inside.float(), 0, kind.expand(count, SIZE, SIZE)[None])[0]
    return (picture + 0.5 * torch.randn(picture.shape, generator=generator))[:, None], kind.flatten()


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """The model and an example batch, for the command line: `autopipe report examples/resnet.py:build`."""
    torch.manual_seed(0)
    return ResNet(), (drawn(32, torch.Generator().manual_seed(0))[0],)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    engine = autopipe.pipeline(
        ResNet(),
        loss_fn=F.cross_entropy,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        data_parallel=1,
        num_microbatches=4,
    )
    held_out, labels = drawn(256, torch.Generator().manual_seed(1))
    for step in range(1, options.steps + 1):
        pictures, kinds = drawn(64, generator)
        loss = engine.train_batch(pictures.to(engine.device), target=kinds.to(engine.device))
        if step % 25 == 0 or step == options.steps:
            scores = engine.predict(held_out.to(engine.device))
            accuracy = (scores.argmax(dim=1).cpu() == labels).float().mean()
            if engine.is_first_rank:
                print(f"step {step:4d}  loss {loss:.3f}  {accuracy:.1%} of 256 held-out pictures right", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
