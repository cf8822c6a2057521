"""Models of ordinary research code that are hard to turn into a graph: (model, args, kwargs) by name."""

from __future__ import annotations

import dataclasses
import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
CASES: dict[str, Callable[[], Case]] = {}
WIDTH = 8


def x(*shape: int) -> Tensor:
    """The input of most cases."""
    return torch.randn(*(shape or (4, WIDTH)))


class Net(nn.Module):
    """Three linear layers around whatever `function(self, h, ...)` does, so that a cut can fall on both sides of it."""

    def __init__(self, function: Callable[..., Any], setup: Callable[[nn.Module], None] | None = None) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.function = (function,)
        if setup is not None:
            setup(self)

    def forward(self, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        h = torch.tanh(self.second(torch.tanh(self.first(value))))
        out = self.function[0](self, h, *args, **kwargs)
        return (
            self.last(out) if isinstance(out, Tensor) and out.shape[-1:] == (WIDTH,) and not out.is_complex() else out
        )


def case(name: str, setup: Callable[[nn.Module], None] | None = None, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Registers a function of (net, hidden) as a case."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        CASES[name] = lambda: (Net(function, setup), (x(), *args), kwargs)
        return function

    return register


def model_case(name: str, *shape: int) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Registers a class of modules as a case."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        CASES[name] = lambda: (cls(), (x(*shape),), {})
        return cls

    return register


# -- in place and views ---------------------------------------------------------------------------------------------------


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


# -- buffers and state ----------------------------------------------------------------------------------------------------


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


@case(
    "batch norm by hand",
    lambda m: [m.register_buffer(n, v) for n, v in (("mean", torch.zeros(WIDTH)), ("var", torch.ones(WIDTH)))] and None,
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


# -- modes ----------------------------------------------------------------------------------------------------------------


@case("no_grad in the middle")
def _(net: Any, h: Tensor) -> Any:
    with torch.no_grad():
        weight = torch.softmax(h, -1)
    return h * weight


@case("enable_grad inside no_grad")
def _(net: Any, h: Tensor) -> Any:
    with torch.no_grad():
        a = h * 2
        with torch.enable_grad():
            b = h * 3
    return a + b


@case("a decorated no_grad function")
def _(net: Any, h: Tensor) -> Any:
    @torch.no_grad()
    def normalise(t: Tensor) -> Tensor:
        return t / t.norm(dim=-1, keepdim=True)

    return h + normalise(h)


@case("autocast inside forward")
def _(net: Any, h: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a = net.second(h) @ torch.ones(WIDTH, WIDTH)
        with torch.autocast("cpu", enabled=False):
            b = net.first(a.float())
    return b + a.float()


@case("autocast as a decorator")
def _(net: Any, h: Tensor) -> Any:
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def low(t: Tensor) -> Tensor:
        return net.first(t)

    return low(h).float()


@case("a gradient inside forward")
def _(net: Any, h: Tensor) -> Any:
    energy = net.first(h).square().sum()
    (force,) = torch.autograd.grad(energy, h, create_graph=True)
    return h - force


# -- checkpoints ----------------------------------------------------------------------------------------------------------


@case("checkpoint", lambda m: m.add_module("drop", nn.Dropout(0.3)))
def _(net: Any, h: Tensor) -> Any:
    return checkpoint(lambda t: net.drop(torch.tanh(net.first(t))), h, use_reentrant=False)


@case("reentrant checkpoint", lambda m: m.add_module("drop", nn.Dropout(0.3)))
def _(net: Any, h: Tensor) -> Any:
    return checkpoint(lambda t: net.drop(torch.tanh(net.first(t))), h, use_reentrant=True)


@case("checkpoint whose code writes in place")
def _(net: Any, h: Tensor) -> Any:
    def body(t: Tensor) -> Tensor:
        t = net.first(t)
        t.mul_(2)
        t[:, 0] = 0.0
        return F.relu(t, inplace=True)

    return checkpoint(body, h, use_reentrant=False)


@case("checkpoint around batch norm", lambda m: m.add_module("norm", nn.BatchNorm1d(WIDTH)))
def _(net: Any, h: Tensor) -> Any:
    return checkpoint(lambda t: net.norm(net.first(t)), h, use_reentrant=False)


@case("nested checkpoints")
def _(net: Any, h: Tensor) -> Any:
    inner = lambda t: checkpoint(lambda u: net.first(u).sin(), t, use_reentrant=False) * 2
    return checkpoint(inner, h, use_reentrant=False)


@case("checkpoint with several outputs")
def _(net: Any, h: Tensor) -> Any:
    a, b = checkpoint(lambda t: (net.first(t), t.cos()), h, use_reentrant=False)
    return a * b


@model_case("checkpoint_sequential")
class SequentialCheckpoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))

    def forward(self, v: Tensor) -> Tensor:
        return checkpoint_sequential(self.body, 2, v, use_reentrant=False)


# -- autograd functions and hooks -----------------------------------------------------------------------------------------


class Reversed(torch.autograd.Function):
    """Turns the gradient round."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -ctx.scale * gradients[0], None


class TwoOutputs(torch.autograd.Function):
    """Returns two tensors, one without gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Any:
        index = value.argmax(-1)
        ctx.mark_non_differentiable(index)
        return value * 2, index

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 5


@case("gradient reversal")
def _(net: Any, h: Tensor) -> Any:
    return Reversed.apply(h, 0.7)


@case("an autograd function with two outputs")
def _(net: Any, h: Tensor) -> Any:
    a, index = TwoOutputs.apply(h)
    return a + index[:, None]


@case("a forward hook", lambda m: m.first.register_forward_hook(lambda _m, _a, out: out * 3) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("a forward pre-hook", lambda m: m.first.register_forward_pre_hook(lambda _m, a: (a[0] + 1,)) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("a backward hook", lambda m: m.last.register_full_backward_hook(lambda _m, gi, _go: (gi[0] * 2,)) and None)
def _(net: Any, h: Tensor) -> Any:
    return h * 2


@case(
    "a hook with kwargs",
    lambda m: m.first.register_forward_pre_hook(lambda _m, a, k: ((a[0] * 2,), k), with_kwargs=True) and None,
)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


def _keeps(module: nn.Module) -> None:
    module.features = []  # type: ignore[assignment]
    module.first.register_forward_hook(lambda _m, _a, out: module.features.append(out.detach().mean().item()))  # type: ignore[operator,union-attr]


@case("a hook that keeps features", _keeps)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("a hook on the whole model", lambda m: m.register_forward_hook(lambda _m, _a, out: out * 2) and None)
def _(net: Any, h: Tensor) -> Any:
    return h


@case("a pre-hook on the whole model", lambda m: m.register_forward_pre_hook(lambda _m, a: (a[0] * 2,)) and None)
def _(net: Any, h: Tensor) -> Any:
    return h


@case("a tensor hook in forward")
def _(net: Any, h: Tensor) -> Any:
    y = h * 1
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
    return y


@case("a hook on a parameter", lambda m: m.first.weight.register_hook(lambda g: g * 3) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


# -- parameters -----------------------------------------------------------------------------------------------------------


def _parameter_lists(m: nn.Module) -> None:
    m.scales = nn.ParameterList([nn.Parameter(torch.ones(WIDTH) * i) for i in range(1, 4)])
    m.named = nn.ParameterDict({"a": nn.Parameter(torch.ones(WIDTH)), "b": nn.Parameter(torch.zeros(WIDTH))})


@case("ParameterList and ParameterDict", _parameter_lists)
def _(net: Any, h: Tensor) -> Any:
    for scale in net.scales:
        h = h * scale
    return h * net.named["a"] + net.named["b"]


@case("new weight_norm", lambda m: parametrizations.weight_norm(m.first) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("new spectral_norm", lambda m: parametrizations.spectral_norm(m.first) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("orthogonal parametrization", lambda m: parametrizations.orthogonal(m.first) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("old spectral_norm", lambda m: nn.utils.spectral_norm(m.first) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


def _old_weight_norm(m: nn.Module) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(m.first)


@case("old weight_norm", _old_weight_norm)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


class _Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


@case(
    "a parametrization of one's own",
    lambda m: parametrize.register_parametrization(m.first, "weight", _Symmetric()) and None,
)
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("tied weights", lambda m: setattr(m.first, "weight", m.last.weight))
def _(net: Any, h: Tensor) -> Any:
    return net.first(h)


@case("a weight used as a function's argument")
def _(net: Any, h: Tensor) -> Any:
    return F.linear(h, net.first.weight.t() * 0.5, net.first.bias)


@case("parameters().data read")
def _(net: Any, h: Tensor) -> Any:
    return h * net.first.weight.data.mean()


@case("an L2 penalty over parameters")
def _(net: Any, h: Tensor) -> Any:
    return net.last(h), sum(p.square().sum() for p in net.parameters())


@case("a module called three times")
def _(net: Any, h: Tensor) -> Any:
    for _ in range(3):
        h = net.first(h)
    return h


@case("one module under two names", lambda m: setattr(m, "alias", m.first))
def _(net: Any, h: Tensor) -> Any:
    return net.alias(h) + net.first(h)


@case("a layer outside of the model", lambda m: setattr(m, "hidden_list", [nn.Linear(WIDTH, WIDTH)]))
def _(net: Any, h: Tensor) -> Any:
    return net.hidden_list[0](h)


@case("a frozen layer", lambda m: m.second.requires_grad_(False) and None)
def _(net: Any, h: Tensor) -> Any:
    return net.second(h)


@case("functional_call", lambda m: m.add_module("other", nn.Linear(WIDTH, WIDTH)))
def _(net: Any, h: Tensor) -> Any:
    weights = {n: p * 2 for n, p in net.other.named_parameters()}
    return torch.func.functional_call(net.other, weights, (h,))


# -- operators ------------------------------------------------------------------------------------------------------------


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


# -- random ---------------------------------------------------------------------------------------------------------------


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


# -- values that Python reads ---------------------------------------------------------------------------------------------


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


# -- inputs and outputs ---------------------------------------------------------------------------------------------------


Pair = namedtuple("Pair", ["left", "right"])


@case("keyword-only arguments", None, scale=0.5, shift=None)
def _(net: Any, h: Tensor, *, scale: float, shift: Any = None) -> Any:
    return h * scale if shift is None else h + shift


@case("tensors in **kwargs", None, a=torch.ones(WIDTH), b={"c": torch.ones(WIDTH)})
def _(net: Any, h: Tensor, **extra: Any) -> Any:
    return h * extra["a"] + extra["b"]["c"]


@case("a nested output")
def _(net: Any, h: Tensor) -> Any:
    return {"a": [h, (h + 1, None)], "b": Pair(h * 2, 3), "c": "text", "d": OrderedDict(e=h.sum())}


@case("an output that is an input", None, torch.ones(4))
def _(net: Any, h: Tensor, other: Tensor) -> Any:
    return net.last(h), other


@case("the same output twice")
def _(net: Any, h: Tensor) -> Any:
    y = net.last(h)
    return y, y, y.view(-1)


@case("an output that is a parameter")
def _(net: Any, h: Tensor) -> Any:
    return net.last(h), net.first.weight


@case("integer inputs", None, torch.tensor([1, 0, 2, 1]))
def _(net: Any, h: Tensor, index: Tensor) -> Any:
    return h[index] + F.one_hot(index, WIDTH)


@case("a list of tensors as input", None, [torch.ones(WIDTH), torch.zeros(WIDTH)])
def _(net: Any, h: Tensor, many: list[Tensor]) -> Any:
    return h + torch.stack(many).sum(0)


@case("an input that needs gradients", None, torch.ones(4, WIDTH, requires_grad=True))
def _(net: Any, h: Tensor, other: Tensor) -> Any:
    return h * other


# -- recurrent layers and attention ---------------------------------------------------------------------------------------


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


# -- detectors: numbers and shapes that follow from values ----------------------------------------------------------------


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
    """As speech encoders are: a method draws the mask with numpy and reads a parameter; layers are dropped at a rate of 0."""

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
