# torchrun --nproc-per-node 2 examples/encoder_decoder.py
"""An encoder-decoder of `torch.nn.Transformer` learns to write a word backwards; words have different lengths, padding
is masked.

The masks are read by every layer, so on every stage. The loss is the mean over the tokens that are not padding: with
`loss_weight` a micro-batch counts by those, and loss and gradient are the whole batch's however unevenly they are
padded.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopipe

PAD, BEGIN, END, FIRST_LETTER = 0, 1, 2, 3
LETTERS, LONGEST = 26, 12
VOCAB, IGNORED = FIRST_LETTER + LETTERS, -100


class Reverser(nn.Module):
    """Token ids of the source and of the target so far, (batch, length) each, to the loss and the scores of the next
    token."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, width, padding_idx=PAD), nn.Embedding(LONGEST + 1, width)
        self.transformer = nn.Transformer(
            width, nhead=4, num_encoder_layers=layers, num_decoder_layers=layers,
            dim_feedforward=4 * width, dropout=0.0, batch_first=True,
        )  # fmt: skip
        self.out = nn.Linear(width, VOCAB)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))

    def forward(self, source: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
        padding = source == PAD
        causal = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool, device=target.device).triu(1)
        decoded = self.transformer(
            self.embedded(source),
            self.embedded(target),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        scores = self.out(decoded)
        return {"loss": F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORED), "scores": scores}


def words(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random words of 3 to LONGEST letters: source, target and labels of (count, LONGEST + 1)."""
    source = torch.full((count, LONGEST + 1), PAD)
    target, labels = source.clone(), torch.full((count, LONGEST + 1), IGNORED)
    for row, length in enumerate(torch.randint(3, LONGEST + 1, (count,), generator=generator).tolist()):
        word = torch.randint(FIRST_LETTER, VOCAB, (length,), generator=generator)
        source[row, :length] = word
        target[row, 0], target[row, 1 : length + 1] = BEGIN, word.flip(0)
        labels[row, :length], labels[row, length] = word.flip(0), END
    return {"source": source, "target": target, "labels": labels}


def num_labels(kwargs: dict[str, Tensor]) -> Tensor:
    """The weight of a micro-batch: its tokens that are not padding."""
    return (kwargs["labels"] != IGNORED).sum()


def build() -> tuple[nn.Module, tuple[()], dict[str, Tensor]]:
    """The model and an example batch, for the command line: `autopipe report examples/encoder_decoder.py:build`."""
    torch.manual_seed(0)
    return Reverser(), (), words(32, torch.Generator().manual_seed(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    engine = autopipe.pipeline(
        Reverser(),
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        data_parallel=1,
        num_microbatches=4,
        max_grad_norm=1.0,
        loss_weight=num_labels,
    )
    held_out = {name: x.to(engine.device) for name, x in words(128, torch.Generator().manual_seed(1)).items()}
    for step in range(1, options.steps + 1):
        loss = engine.train_batch(**{name: x.to(engine.device) for name, x in words(64, generator).items()})
        if step % 50 == 0 or step == options.steps:
            scores = engine.predict(**held_out)["scores"]
            counted = held_out["labels"] != IGNORED
            right = (scores.argmax(dim=-1) == held_out["labels"])[counted].float().mean()
            if engine.is_first_rank:
                print(f"step {step:4d}  loss {loss:.3f}  {right:.1%} of the held-out letters right", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
