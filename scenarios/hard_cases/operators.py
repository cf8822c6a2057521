"""Cases about operators: complex numbers, higher-order functions, random numbers, recurrent layers, attention."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scenarios.hard_cases.registry import WIDTH, case

# -- operators ---------------------------------------------------------------------------------------------------------


@case("complex numbers and FFT")
def _(net: Any, h: Tensor) -> Any:
    spectrum = torch.fft.rfft(h)
    return torch.fft.irfft(spectrum * torch.polar(torch.ones(5), torch.arange(5.0)), n=WIDTH)


@case("a complex output")
def _(net: Any, h: Tensor) -> Any:
    return torch.view_as_complex(h.view(4, 4, 2)).exp()


@case("real and imag")
def _(net: Any, h: Tensor) -> Any:
    z = torch.complex(h, h.flip(0))
    return z.real * z.imag + z.conj().imag + z.abs()


@case("stft")
def _(net: Any, h: Tensor) -> Any:
    s = torch.stft(h.repeat(1, 8), 16, hop_length=8, window=torch.hann_window(16), return_complex=True)
    return s.abs().mean((1, 2))[:, None] * h


@case("einsum and operators")
def _(net: Any, h: Tensor) -> Any:
    return torch.einsum("bi,bj,ij->bj", h, h, net.first.weight) @ net.second.weight**2 % 3


@case("reflected operators")
def _(net: Any, h: Tensor) -> Any:
    return 1 - h + 2 / (3 + abs(h)) + 2**h - (-h) % 3


@case("iteration, unpacking and len")
def _(net: Any, h: Tensor) -> Any:
    first, *rest = h
    return torch.stack([first, *(r * len(h) for r in reversed(rest))])


@case("comparisons and where")
def _(net: Any, h: Tensor) -> Any:
    return torch.where((h > 0) & ~(h > 1) | (h == 0), h, -h).clamp(min=-1)


@case("topk, sort and gather")
def _(net: Any, h: Tensor) -> Any:
    values, index = h.topk(3, -1)
    ordered = h.sort(-1)
    return h.gather(1, index).sum(-1, keepdim=True) * ordered.values + values.mean() + ordered[1]


@case("torch.vmap")
def _(net: Any, h: Tensor) -> Any:
    return torch.vmap(lambda row: row * row.sum())(h)


@case("torch.vmap over a tensor from around it")
def _(net: Any, h: Tensor) -> Any:
    scale = h.mean(0)
    return torch.vmap(lambda row: row * scale)(h)


class Slope(nn.Module):
    """The slope of a function over a tensor from around it."""

    def forward(self, h: Tensor) -> Tensor:
        scale = h.detach().mean(0)
        return torch.func.grad(lambda t: (t.sin() * scale).sum())(h)


@case("torch.func.grad in a submodule", lambda m: m.add_module("slope", Slope()))
def _(net: Any, h: Tensor) -> Any:
    return h + net.slope(h)


@case("torch.vmap of functions in a tuple, one of them over a tensor")
def _(net: Any, h: Tensor) -> Any:
    scale = h.mean(0)
    functions = (lambda row: row.sin(), lambda row: row * scale)
    return torch.vmap(lambda row: sum(function(row) for function in functions))(h)


@case("torch.cond")
def _(net: Any, h: Tensor) -> Any:
    return torch.cond(h.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (h,))


@case("linear algebra")
def _(net: Any, h: Tensor) -> Any:
    q, r = torch.linalg.qr(h.T @ h + 3 * torch.eye(WIDTH))
    return h @ torch.linalg.solve(r, q.T)


@case("interpolate, pad and unfold")
def _(net: Any, h: Tensor) -> Any:
    image = F.pad(h.view(1, 1, 4, 8), (1, 1, 1, 1), mode="reflect")
    return F.interpolate(image, scale_factor=2, mode="bilinear").unfold(2, 3, 2).mean((1, 2, 4))[:, :WIDTH]


@case("new tensors like others")
def _(net: Any, h: Tensor) -> Any:
    return h + h.new_ones(WIDTH) + torch.full_like(h, 2) + torch.arange(WIDTH).to(h) + torch.tensor([1.0]).type_as(h)


@case("numpy constants")
def _(net: Any, h: Tensor) -> Any:
    return h + torch.from_numpy(np.linspace(0, 1, WIDTH, dtype=np.float32)) + torch.tensor(np.float32(2.0))


# -- random ------------------------------------------------------------------------------------------------------------


@case("functional dropout and noise")
def _(net: Any, h: Tensor) -> Any:
    h = F.dropout(h, 0.3, net.training)
    return h + torch.randn_like(h) * 0.1 if net.training else h


@case("stochastic depth drawn by torch")
def _(net: Any, h: Tensor) -> Any:
    keep = torch.empty(h.shape[0], 1).bernoulli_(0.5) if net.training else torch.ones(h.shape[0], 1)
    return h + net.first(h) * keep


@case("layer drop drawn by torch, read by Python")
def _(net: Any, h: Tensor) -> Any:
    for layer in (net.first, net.second):
        if net.training and torch.rand([]) < 0.3:
            continue
        h = layer(h)
    return h


@case("layer drop drawn by Python")
def _(net: Any, h: Tensor) -> Any:
    for layer in (net.first, net.second):
        if net.training and random.random() < 0.3:
            continue
        h = layer(h)
    return h


@case("noise drawn by numpy")
def _(net: Any, h: Tensor) -> Any:
    return h * float(np.random.rand()) if net.training else h


@case("gumbel softmax")
def _(net: Any, h: Tensor) -> Any:
    return F.gumbel_softmax(h, hard=True)


@case("a distribution of torch")
def _(net: Any, h: Tensor) -> Any:
    return torch.distributions.Normal(h, torch.ones_like(h)).rsample()


@case("rrelu and alpha dropout")
def _(net: Any, h: Tensor) -> Any:
    return F.rrelu(h, training=net.training) + F.alpha_dropout(h, 0.2, net.training)


# -- recurrent layers and attention ------------------------------------------------------------------------------------


def _recurrent(name: str, make: Callable[[], nn.Module], call: Callable[[nn.Module, Tensor], Any]) -> None:
    def setup(net: nn.Module) -> None:
        net.add_module("cell", make())

    case(name, setup)(lambda net, h: call(net.cell, h.view(2, 2, WIDTH)))


_recurrent(
    "bidirectional LSTM",
    lambda: nn.LSTM(8, 8, 2, bidirectional=True, dropout=0.2, batch_first=True),
    lambda m, h: m(h)[0][..., :8],
)
_recurrent("LSTM with projection", lambda: nn.LSTM(8, 12, proj_size=8), lambda m, h: m(h)[0] + m(h)[1][0][0])
_recurrent("LSTM with its state returned", lambda: nn.LSTM(8, 8, 2), lambda m, h: m(h))
_recurrent("GRU", lambda: nn.GRU(8, 8, 2), lambda m, h: m(h)[0] + m(h)[1].sum(0))
_recurrent("RNN", lambda: nn.RNN(8, 8, nonlinearity="relu"), lambda m, h: m(h, torch.zeros(1, 2, 8))[0])
_recurrent("LSTM cell in a loop", lambda: nn.LSTMCell(8, 8), lambda m, h: m(h[1], m(h[0]))[0])
_recurrent(
    "multi-head attention",
    lambda: nn.MultiheadAttention(8, 2, dropout=0.1),
    lambda m, h: m(h, h, h)[0] + m(h, h, h)[1].sum(),
)
_recurrent(
    "a transformer",
    lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
    lambda m, h: m(h, h, tgt_mask=nn.Transformer.generate_square_subsequent_mask(2)),
)
_recurrent(
    "a transformer encoder",
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    lambda m, h: m(h),
)
