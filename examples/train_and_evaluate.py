# torchrun --nproc-per-node 2 examples/train_and_evaluate.py
"""A whole training script: epochs over a DataLoader, warm-up and cosine decay, clipping, evaluation on files that are
never trained on, the best checkpoint kept and loaded at the end.

The model is a byte-level LSTM, trained on the modules of Python's standard library.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

import autopipe

VOCAB, CONTEXT = 256, 64


class ByteLSTM(nn.Module):
    """Bytes, (batch, time), to the scores of the next one, (batch, time, VOCAB); dropout between the layers."""

    def __init__(self, width: int = 96, layers: int = 3) -> None:
        super().__init__()
        self.embed, self.dropout = nn.Embedding(VOCAB, width), nn.Dropout(0.1)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + self.dropout(layer(x)[0])
        return self.head(self.norm(x))


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of CONTEXT bytes over files, one after the other, and the bytes that follow each."""

    def __init__(self, files: list[Path], windows: int) -> None:
        text = b"".join(f.read_bytes() for f in files)[: windows * CONTEXT + 1]
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return (len(self.data) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        begin = index * CONTEXT
        return self.data[begin : begin + CONTEXT], self.data[begin + 1 : begin + CONTEXT + 1]


def datasets(windows: int) -> tuple[Windows, Windows]:
    """For training, and, a tenth as much and of other files, for evaluation."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return Windows([f for i, f in enumerate(files) if i % 10], windows), Windows(files[::10], windows // 10)


def token_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the next byte, in nats."""
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten())


def warmup_and_cosine(step: int, *, warmup: int, total: int) -> float:
    """The factor of the learning rate."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """The model and an example batch, for the command line: `autopipe report examples/train_and_evaluate.py:build`."""
    torch.manual_seed(0)
    return ByteLSTM(), (torch.randint(VOCAB, (32, CONTEXT)),)


def evaluate(engine: autopipe.Engine, loader: DataLoader[tuple[Tensor, Tensor]]) -> float:
    """Nats per byte over all of a loader's samples, the last short batch counted by its size."""
    total, count = 0.0, 0
    for ids, labels in loader:
        total += len(ids) * float(engine.eval_batch(ids.to(engine.device), target=labels.to(engine.device)))
        count += len(ids)
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--windows", type=int, default=4000)
    parser.add_argument("--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "train_and_evaluate")
    options = parser.parse_args()

    torch.manual_seed(0)
    training, held_out = datasets(options.windows)
    # Every rank reads the same batches, so the order is drawn from a seed of its own.
    loader = DataLoader(training, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    evaluation = DataLoader(held_out, batch_size=64)
    total = options.epochs * len(loader)
    engine = autopipe.pipeline(
        ByteLSTM(),
        loss_fn=token_loss,
        optimizer=partial(torch.optim.AdamW, lr=4e-3),
        lr_scheduler=partial(LambdaLR, lr_lambda=partial(warmup_and_cosine, warmup=total // 10 + 1, total=total)),
        max_grad_norm=1.0,
        data_parallel=1,
        num_microbatches=4,
        seed=0,
    )
    best = math.inf
    for epoch in range(1, options.epochs + 1):
        losses = [engine.train_batch(x.to(engine.device), target=y.to(engine.device)) for x, y in loader]
        now = evaluate(engine, evaluation)
        if engine.is_first_rank:
            print(
                f"epoch {epoch}  trained {torch.stack(losses).mean():.3f}  held out {now:.3f} nats per byte", flush=True
            )
        if now < best:
            best = now
            engine.save_checkpoint(options.checkpoints, client_state={"epoch": epoch, "held_out": now}, keep=1)
    state = engine.load_checkpoint(options.checkpoints)
    again = evaluate(engine, evaluation)
    if engine.is_first_rank:
        print(
            f"best: epoch {state['epoch']}, {again:.3f} nats per byte after loading, {state['held_out']:.3f} when saved"
        )
    engine.close()


if __name__ == "__main__":
    main()
