"""Models that are hard to cut, each with a batch: (model, args, kwargs, target, loss function)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any, Any]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(a.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class TiedGPT(nn.Module):
    """A GPT whose head is its embedding."""

    def __init__(self, vocab: int = 50, width: int = 16, layers: int = 4, context: int = 12) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ResNet(nn.Module):
    """Residual blocks with batch norm and in-place activations."""

    def __init__(self, width: int = 8, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu_(block(x) + x)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """The first activation is read by two later stages, and skips from the first stage to the last."""

    def __init__(self, width: int = 12, depth: int = 4) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = torch.tanh(layer(x))
            skips.append(x)
        first = skips[0]
        for layer in self.up:
            x = torch.tanh(layer(torch.cat([x, skips.pop()], dim=-1))) + 0.5 * first
        return x


class EncoderDecoder(nn.Module):
    """A boolean mask and integer ids are read in every stage; the output is a dict with the loss in it."""

    def __init__(self, vocab: int = 30, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.segment = nn.ModuleList(nn.Embedding(vocab, width) for _ in range(layers))
        self.encoder = nn.ModuleList(Block(width, 2) for _ in range(layers))
        self.cross = nn.ModuleList(nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(layers))
        self.out = nn.Linear(width, vocab)

    def forward(self, source: Tensor, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Any]:
        memory, y = self.embed(source), self.embed(ids)
        for block, segment in zip(self.encoder, self.segment, strict=True):
            memory = block(memory + segment(source)).masked_fill(mask[..., None], 0.0)
        for cross, segment in zip(self.cross, self.segment, strict=True):
            y = y + cross(y + segment(ids), memory, memory, key_padding_mask=mask, need_weights=False)[0]
        logits = self.out(y)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits, "nothing": None}


class Frozen(nn.Module):
    """The first layers are frozen, and one branch is not used in this batch."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.unused = nn.Linear(width, width)
        self.layers[0].requires_grad_(False)
        self.layers[1].requires_grad_(False)
        self.layers[4].bias.requires_grad_(False)

    def forward(self, x: Tensor, branch: bool = False) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.unused(x) if branch else x


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy of every token."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def make(name: str, batch: int) -> Case:
    """A model and a batch of `batch` samples, from a fixed seed."""
    torch.manual_seed(1)
    if name == "gpt":
        return TiedGPT(), (torch.randint(0, 50, (batch, 12)),), {}, torch.randint(0, 50, (batch, 12)), token_loss
    if name == "resnet":
        return ResNet(), (torch.randn(batch, 3, 6, 6),), {}, torch.randint(0, 5, (batch,)), F.cross_entropy
    if name == "unet":
        return UNet(), (torch.randn(batch, 12),), {}, torch.randn(batch, 12), F.mse_loss
    if name == "encoder_decoder":
        mask = torch.zeros(batch, 7, dtype=torch.bool)
        mask[:, 5:] = True
        kwargs = {"mask": mask, "labels": torch.randint(0, 30, (batch, 6))}
        return (
            EncoderDecoder(),
            (torch.randint(0, 30, (batch, 7)), torch.randint(0, 30, (batch, 6))),
            kwargs,
            None,
            None,
        )
    if name == "frozen":
        return Frozen(), (torch.randn(batch, 12),), {}, torch.randn(batch, 12), F.mse_loss
    raise ValueError(name)


NAMES = ("gpt", "resnet", "unet", "encoder_decoder", "frozen")
