"""Small models that a plain symbolic trace takes in, each with inputs, for the tests of the profiler."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional as F

import profiler


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        q, k, v = (self._heads(t, i) for t in (self.qkv(self.norm1(x)).chunk(3, -1),) for i in range(3))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def _heads(self, chunks, i):
        return chunks[i].unflatten(-1, (4, -1)).transpose(1, 2)


class Gpt(nn.Module):
    """Tied embedding and head, loss inside."""

    def __init__(self, layers: int = 2, width: int = 64, vocabulary: int = 211, length: int = 32) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.register_buffer("index", torch.arange(length))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)  # else softmax gives subnormal numbers, slow on some CPUs
        self.head.weight = self.embed.weight

    def forward(self, ids, target):
        x = self.embed(ids) + self.position(self.index)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), target.flatten())


class Convolutional(nn.Module):
    """Batch norm, in-place ReLU on its output, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        return self.head(F.dropout(self.relu(y), 0.2, self.training).mean((2, 3)))


class WrittenViews(nn.Module):
    """A view that is written to, a buffer that is updated, a value kept by three savers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps.add_(x.mean())
        h = torch.tanh(self.linear(x))
        y = torch.zeros_like(h)
        y[:, :8].copy_(h[:, 8:] * self.scale[:8])
        y[:, 8:].mul_(2.0)
        return (h.sin() * h.exp() + y * h).sigmoid_()


class Frozen(nn.Module):
    """A frozen first layer, one that runs without gradients, a boolean mask, integer arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.first.requires_grad_(False)

    def forward(self, x, mask, ids):
        h = F.relu(self.first(x))
        h = self.second(h).masked_fill(mask.unsqueeze(-1), 0.0)
        picked = h[ids % 3, ids]
        return self.third(picked), h.detach().argmax(-1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 12, num_layers=2, batch_first=True, dropout=0.1), nn.Linear(12, 3)

    def forward(self, x):
        y, (hidden, _) = self.lstm(x)
        return self.head(y[:, -1]) + hidden.sum()


def cases() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """Each model with its inputs."""
    ids = torch.randint(0, 211, (2, 32))
    return {
        "gpt": (Gpt(), (ids, ids.roll(-1, 1))),
        "convolutional": (Convolutional(), (torch.randn(4, 3, 16, 16),)),
        "written views": (WrittenViews(), (torch.randn(6, 16),)),
        "frozen": (Frozen(), (torch.randn(5, 6, 12), torch.rand(5, 6) > 0.5, torch.randint(0, 5, (7,)))),
        "recurrent": (Recurrent(), (torch.randn(3, 7, 8),)),
    }


def quick(model, args, **kwargs):
    """A profile in half a second, never from the cache."""
    traced = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    return profiler.profile(traced, args, **{"budget_s": 0.5, "progress": False, "cache": False, **kwargs})
