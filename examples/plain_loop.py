# torchrun --nproc-per-node 2 examples/plain_loop.py
"""The plain PyTorch loop: no optimizer is given, so `train_batch` only adds gradients, and the script clears and steps
by itself.

Two batches are accumulated for each step of the optimizer.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopipe


class Classifier(nn.Module):
    """A stack of linear layers with a bottleneck: (batch, 32) to (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(32, 512), nn.Linear(512, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(F.gelu(self.widen(x)))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def clusters(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points around ten centres, (count, 32), and the number of the centre, (count,)."""
    centres = torch.randn(10, 32, generator=torch.Generator().manual_seed(7))
    kind = torch.randint(10, (count,), generator=generator)
    return centres[kind] + 1.5 * torch.randn(count, 32, generator=generator), kind


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """The model and an example batch, for the command line: `autopipe report examples/plain_loop.py:build`."""
    torch.manual_seed(0)
    return Classifier(), (clusters(64, torch.Generator().manual_seed(0))[0],)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    example, _ = clusters(64, generator)
    # The example lets the model be placed at once, so that its parameters are there for the optimizer.
    engine = autopipe.pipeline(
        Classifier(),
        loss_fn=F.cross_entropy,
        data_parallel=1,
        num_microbatches=4,
        example_args=(example,),
        example_target=torch.zeros(64, dtype=torch.long),
    )
    optimizer = torch.optim.SGD(engine.parameters(), lr=0.02, momentum=0.9)

    for step in range(1, options.steps + 1):
        optimizer.zero_grad()
        for _ in range(2):
            x, kind = clusters(64, generator)
            loss = engine.train_batch(x.to(engine.device), target=kind.to(engine.device))
        for parameter in engine.parameters():  # the gradients of two batches were added; their mean is wanted
            if parameter.grad is not None:
                parameter.grad /= 2
        optimizer.step()
        if engine.is_first_rank and (step % 20 == 0 or step == options.steps):
            print(f"step {step:3d}  loss {loss:.3f}", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
