"""Cases that write: in place, to views, to buffers, and to what a module keeps between calls."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scenarios.hard_cases.registry import WIDTH, case, model_case

# -- in place and views ------------------------------------------------------------------------------------------------


@case("in place on a view")
def _(net: Any, h: Tensor) -> Any:
    h = h * 1
    h[:, :2] += 1
    h.view(-1)[::3].mul_(0.5)
    return h


@case("in place with a mask")
def _(net: Any, h: Tensor) -> Any:
    h = h.clone()
    h[h > 0.3] = 0.0
    h.masked_fill_(h < -0.5, 0.25)
    return h


@case("out argument", lambda m: m.register_buffer("space", torch.zeros(4, WIDTH), persistent=False))
def _(net: Any, h: Tensor) -> Any:
    with torch.no_grad():
        torch.mul(h, 2, out=net.space)
    return h + net.space


@case("fills an empty tensor by rows")
def _(net: Any, h: Tensor) -> Any:
    rows = torch.empty(4, WIDTH)
    for i in range(4):
        rows[i] = h[3 - i] * (i + 1)
    return rows


@case("augmented assignment of an attribute of a list")
def _(net: Any, h: Tensor) -> Any:
    pieces = [h[:, :4] * 1, h[:, 4:] * 1]
    pieces[0] += 1
    pieces[1] -= pieces[0]
    return torch.cat(pieces, -1)


@case("a view read before and after a write")
def _(net: Any, h: Tensor) -> Any:
    h = h + 0
    top = h[:2]
    before = top.sum()
    h.add_(1)
    return h * before + top.sum()


@case("detach and copy_")
def _(net: Any, h: Tensor) -> Any:
    c = torch.zeros_like(h)
    c.copy_(h.detach())
    return h * c


@case("scatter and index_add")
def _(net: Any, h: Tensor) -> Any:
    index = torch.tensor([3, 1, 0, 2])
    return torch.zeros_like(h).index_add_(0, index, h).scatter_add(1, index.view(4, 1), h[:, :1])


@case("the input is written")
def _(net: Any, h: Tensor) -> Any:
    return F.relu_(F.dropout(h, 0.2, net.training, inplace=False)) + F.leaky_relu_(h * 2)


@case("split in place")
def _(net: Any, h: Tensor) -> Any:
    h = h.clone()
    a, b = h.chunk(2, -1)
    h = h * 2
    return torch.cat([a * b, b], -1) + h


@case("requires_grad_ inside forward")
def _(net: Any, h: Tensor) -> Any:
    return h + torch.ones(WIDTH).requires_grad_(False)


# -- buffers and state -------------------------------------------------------------------------------------------------


@case("a reassigned buffer", lambda m: m.register_buffer("mean", torch.zeros(WIDTH)))
def _(net: Any, h: Tensor) -> Any:
    net.mean = 0.9 * net.mean + 0.1 * h.detach().mean(0)
    return h - net.mean


@case("an integer counter buffer", lambda m: m.register_buffer("count", torch.zeros((), dtype=torch.long)))
def _(net: Any, h: Tensor) -> Any:
    net.count += 1
    return h / net.count


@case("a Python counter that does not steer", lambda m: setattr(m, "calls", 0))
def _(net: Any, h: Tensor) -> Any:
    net.calls += 1
    return h * 2


@case("a buffer kept in a dict attribute", lambda m: setattr(m, "cache", {"k": torch.ones(WIDTH)}))
def _(net: Any, h: Tensor) -> Any:
    return h * net.cache["k"]


@case("a cache that forward fills", lambda m: setattr(m, "cache", {}))
def _(net: Any, h: Tensor) -> Any:
    if "k" not in net.cache:
        net.cache["k"] = torch.arange(WIDTH, dtype=torch.float32)
    return h + net.cache["k"]


def _with_statistics(net: Any) -> None:
    net.register_buffer("mean", torch.zeros(WIDTH))
    net.register_buffer("var", torch.ones(WIDTH))


@case(
    "batch norm by hand",
    _with_statistics,
)
def _(net: Any, h: Tensor) -> Any:
    return F.batch_norm(h, net.mean, net.var, training=net.training, momentum=0.3)


@case("the last activation kept as an attribute", lambda m: setattr(m, "kept", None))
def _(net: Any, h: Tensor) -> Any:
    net.kept = h.detach()
    return h + net.kept.mean()


@model_case("batch norm with cumulative average")
class CumulativeNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(inplace=True), nn.Linear(8, 8)
        )

    def forward(self, v: Tensor) -> Tensor:
        return self.body(v)


@model_case("an exponential average of weights")
class EmaTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.teacher.requires_grad_(False)

    def forward(self, v: Tensor) -> Any:
        with torch.no_grad():
            goal = self.teacher(v)
        return {"loss": F.mse_loss(self.head(self.student(v)), goal), "goal": goal}


@model_case("a vector quantiser with straight-through gradients")
class Quantiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.codes, self.decode = nn.Linear(8, 8), nn.Embedding(5, 8), nn.Linear(8, 8)
        self.register_buffer("used", torch.zeros(5))

    def forward(self, v: Tensor) -> Any:
        z = self.encode(v)
        best = torch.cdist(z, self.codes.weight).argmin(-1)
        if self.training:
            with torch.no_grad():
                self.used.mul_(0.9).add_(F.one_hot(best, 5).sum(0), alpha=0.1)
        q = self.codes(best)
        return self.decode(z + (q - z).detach()), F.mse_loss(q, z.detach())
