"""Cases whose Python reads values of tensors, or whose shapes follow from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scenarios.hard_cases.registry import CASES, WIDTH, case, x

# -- values that Python reads ------------------------------------------------------------------------------------------


class ReadsValue(nn.Module):
    """A branch on a value, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, v: Tensor) -> Tensor:
        return self.a(v) if v.sum() > 0 else self.a(v) * 2


class Experts(nn.Module):
    """Each token goes to its best expert: shapes depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, v: Tensor) -> Tensor:
        weights, choice = self.gate(v).softmax(-1).max(-1)
        out = torch.zeros_like(v)
        for i, expert in enumerate(self.experts):
            rows = (choice == i).nonzero().flatten()
            if rows.numel():
                out[rows] = expert(v[rows]) * weights[rows, None]
        return out


class Holder:
    """An object that nobody registered, with tensors in it."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.seen = value, [value * 2]


class TakesObject(nn.Module):
    """Reads a value, and takes an object."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, v: Tensor, holder: Holder) -> Tensor:
        return self.a(v) * holder.seen[0] if v.sum() > 0 else holder.value


@dataclasses.dataclass
class State:
    """A dataclass between modules."""

    hidden: Tensor
    extra: Any = None


class TakesDataclass(nn.Module):
    """Reads a value, takes and gives a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, state: State) -> State:
        h = self.a(state.hidden)
        return State(h if h.sum() > 0 else h * 2, state.extra)


@case("a branch on a value in a submodule", lambda m: m.add_module("reads", ReadsValue()))
def _(net: Any, h: Tensor) -> Any:
    return net.reads(h)


@case("a branch on a value in the model")
def _(net: Any, h: Tensor) -> Any:
    return net.first(h) if h.sum() > -1e6 else h


@case("mixture of experts", lambda m: m.add_module("experts", Experts()))
def _(net: Any, h: Tensor) -> Any:
    return h + net.experts(h)


@case("an object as argument of an opaque module", lambda m: m.add_module("reads", TakesObject()))
def _(net: Any, h: Tensor) -> Any:
    return net.reads(h, Holder(net.first(h)))


def _two_that_take_dataclasses(net: Any) -> None:
    net.add_module("a", TakesDataclass())
    net.add_module("b", TakesDataclass())


@case("a dataclass between opaque modules", _two_that_take_dataclasses)
def _(net: Any, h: Tensor) -> Any:
    return net.b(net.a(State(h, "kept"))).hidden


@case("an object between ordinary modules")
def _(net: Any, h: Tensor) -> Any:
    holder = Holder(net.first(h))
    return net.second(holder.value) + holder.seen[0]


class Scripted(nn.Module):
    """A loop that torch.jit turns into a script."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, v: Tensor) -> Tensor:
        for _ in range(2):
            v = torch.tanh(self.a(v))
        return v


def _script(m: nn.Module) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m.add_module("scripted", torch.jit.script(Scripted()))


@case("a scripted submodule", _script)
def _(net: Any, h: Tensor) -> Any:
    return net.scripted(h)


@case("a compiled submodule", lambda m: m.add_module("fast", torch.compile(Scripted(), backend="eager")))  # type: ignore[arg-type]
def _(net: Any, h: Tensor) -> Any:
    return net.fast(h)


@case("masked selection", lambda m: m.add_module("experts", Experts()))
def _(net: Any, h: Tensor) -> Any:
    return h + (h[h > 0].sum() if h.shape[0] == 3 else h.sum())


@case("boolean indexing")
def _(net: Any, h: Tensor) -> Any:
    return net.last(h) * h[h > -10].mean()


@case("nonzero in the model")
def _(net: Any, h: Tensor) -> Any:
    rows = (h.sum(-1) > -1e6).nonzero().flatten()
    return h[rows]


@case("numpy inside forward, without gradient")
def _(net: Any, h: Tensor) -> Any:
    scale = h.detach().numpy().max()
    return h / float(scale)


@case("packed sequences")
def _(net: Any, h: Tensor) -> Any:
    packed = nn.utils.rnn.pack_padded_sequence(h.view(2, 2, WIDTH), torch.tensor([2, 1]), batch_first=True)
    padded, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    return padded


# -- detectors: numbers and shapes that follow from values -------------------------------------------------------------


class Scales(nn.Module):
    """Draws a scale from a list, and gives the size of the result as numbers beside the tensor."""

    def forward(self, h: Tensor) -> tuple[Tensor, list[int]]:
        scale = [2.0][int(torch.rand(1).item())]
        return h * scale, [int(n) for n in h.shape]


class Proposals(nn.Module):
    """Gives as many rows as there are large sums."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> tuple[list[Tensor], Tensor]:
        scores = self.score(h)
        rows = torch.where(scores.sum(-1) > scores.sum(-1).mean() - 1e-3)[0]
        return [h[rows], scores[rows]], scores.sum() * 0.1


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: list[Tensor], size: list[int]) -> Tensor:
        return self.out(torch.cat(rows)).sum(0) / rows[0].shape[0] + size[0]


class Detector(nn.Module):
    """As two-stage detectors are: only a first part has shapes that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.scales, self.proposals, self.heads = Scales(), Proposals(), Heads()
        self.trunk = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    def forward(self, value: Tensor) -> dict[str, Tensor]:
        h, size = self.scales(value)
        if (h > 1e6).any():
            raise ValueError("too large")
        rows, loss = self.proposals(self.trunk(h))
        return {"heads": self.heads([r * 2 for r in rows], size), "proposals": loss}


class OneStageDetector(Detector):
    """Its loss, a method of the model, picks rows by value."""

    def forward(self, value: Tensor) -> dict[str, Tensor]:
        h, size = self.scales(value)
        return {"loss": self.compute_loss(self.heads.out(self.trunk(h)), size[0])}

    def compute_loss(self, scores: Tensor, number: int) -> Tensor:
        found = scores[scores.sum(-1) > scores.sum(-1).mean() - 1e-3]
        return found.sum() / max(1, found.numel()) / number


CASES["a detector in two steps"] = lambda: (Detector(), (x(),), {})
CASES["a detector in one step"] = lambda: (OneStageDetector(), (x(),), {})


class SpecAugment(nn.Module):
    """As speech encoders are: a method draws the mask with numpy and reads a parameter; layers are dropped at a rate of
    0."""

    def __init__(self) -> None:
        super().__init__()
        self.masked = nn.Parameter(torch.rand(WIDTH))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.layerdrop = 0.0

    def forward(self, h: Tensor) -> Tensor:
        h = self.mask(h * 1)
        for layer in self.layers:
            if not (self.training and torch.rand([]) < self.layerdrop):
                h = torch.tanh(layer(h))
        return h

    def mask(self, h: Tensor) -> Tensor:
        h[torch.from_numpy(np.random.rand(4) < 0.5)] = self.masked
        return h


class Speech(nn.Module):
    """Labels of different lengths are picked by value and go into a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = SpecAugment(), nn.Linear(WIDTH, 5)

    def forward(self, h: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if labels.max() >= 5:
            raise ValueError("a label outside of the vocabulary")
        mask = labels >= 0
        logits = self.head(self.encoder(h))
        log_probs = logits.log_softmax(-1)[:, None].expand(-1, 2, -1)
        loss = F.ctc_loss(log_probs, labels[mask], torch.full((2,), 4), mask.sum(-1))
        return {"loss": loss, "logits": logits}


CASES["speech with numpy masks and labels picked by value"] = lambda: (
    Speech(), (x(), torch.tensor([[1, 2, -1], [3, -1, -1]])), {},
)  # fmt: skip


@case("labels of any length picked by value", None, torch.tensor([[1, 2, -1], [3, -1, -1]]))
def _(net: Any, h: Tensor, labels: Tensor) -> Any:
    mask = labels >= 0
    log_probs = net.last(h).log_softmax(-1)[:, None].expand(-1, 2, -1)
    return F.ctc_loss(log_probs, labels.masked_select(mask), torch.full((2,), 4), mask.sum(-1))
