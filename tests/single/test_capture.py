"""Capture: graphs that compute what the model computes, or a refusal that names module, file and line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autopipe
from autopipe.capture.regions import region_of
from scenarios.pipelines import NAMES, make


@dataclasses.dataclass
class Output:
    loss: Tensor
    hidden: list[Tensor]
    name: str = "out"


class ReturnsDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Output:
        h = self.a(x) * scale
        return Output(loss=self.b(h).square().mean(), hidden=[h, h + 1])


class Writes(nn.Module):
    """In-place operations, views that are written, a counter buffer, a reassigned buffer, a no_grad statistic."""

    count: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("scratch", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        h.mul_(2)
        h[:, 0] = 0.0
        h.view(-1)[1::4] += 1.0
        self.count += 1
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
        h = F.relu(h, inplace=True)
        return self.outer(h + self.mean + self.scratch) / self.count


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.a(x)
            with torch.autocast("cpu", enabled=False):
                h = self.b(h.float())
            h = h @ h.T
        return h.float()


class Reads(nn.Module):
    """Python reads a value of a tensor: kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if bool(x.sum() > 0) else x * 2


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, 2, batch_first=True, bidirectional=True), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, (hidden, cell) = self.lstm(x)
        best, _ = out.max(1)
        return self.head(best), hidden.sum(0) + cell.mean(0)


class Square(torch.autograd.Function):
    """Its backward is wrong by purpose, so that a replaced one would be seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 7 * grad * ctx.saved_tensors[0]


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(self.a(x)).sum(-1)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.a, self.b, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda y: self.drop(torch.tanh(self.a(y))), self.a(x), use_reentrant=self.reentrant)
        return self.b(h)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.a.register_forward_hook(lambda module, args, out: out * 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


CASES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]] = {
    "dataclass": lambda: (ReturnsDataclass(), (torch.randn(3, 4),), {"scale": 0.5}),
    "writes": lambda: (Writes(), (torch.randn(3, 4),), {}),
    "autocast": lambda: (Autocast(), (torch.randn(3, 4),), {}),
    "opaque": lambda: (nn.Sequential(nn.Linear(4, 4), Reads(), nn.Linear(4, 4)), (torch.randn(3, 4),), {}),
    "guarded": lambda: (Reads(), (torch.ones(3, 4),), {}),
    "recurrent": lambda: (Recurrent(), (torch.randn(3, 5, 4),), {}),
    "custom backward": lambda: (Custom(), (torch.randn(3, 4),), {}),
    "checkpoint": lambda: (Checkpointed(False), (torch.randn(3, 4),), {}),
    "reentrant checkpoint": lambda: (Checkpointed(True), (torch.randn(3, 4),), {}),
    "hook": lambda: (Hooked(), (torch.randn(3, 4),), {}),
    "weight norm": lambda: (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh()),
        (torch.randn(3, 4),),
        {},
    ),
    "spectral norm": lambda: (
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh()),
        (torch.randn(3, 4),),
        {},
    ),
    "transformer layer": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(3, 5, 8),), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_self_check_passes(name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs = CASES[name]()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    rng = torch.get_rng_state()
    captured = autopipe.capture(model, args, kwargs)
    assert torch.equal(rng, torch.get_rng_state())
    for n, b in model.named_buffers():
        assert torch.equal(b, buffers[n]), n
    torch.manual_seed(1)
    expected = model(*args, **kwargs)
    with torch.no_grad():
        for n, b in model.named_buffers():
            b.copy_(buffers[n])
    torch.manual_seed(1)
    got = captured(*args, **kwargs)
    assert type(got) is type(expected)
    pairs = zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_models_are_recorded_whole(name: str) -> None:
    model, args, kwargs, target, loss_fn = make(name, 2)
    captured = autopipe.capture(model, args, kwargs, loss_fn=loss_fn, target=target)
    assert captured.route == "recorded"
    assert not captured.opaque
    assert captured.loss is not None
    assert "nodes" in captured.report()


def test_regions_stay_with_their_nodes() -> None:
    captured = autopipe.capture(Autocast(), (torch.randn(3, 4),))
    states = {n.target: region_of(n).autocast for n in captured.nodes if n.op == "call_module"}
    assert states["a"] == (("cpu", torch.bfloat16, True),)
    assert states["b"] == ()


def test_writes_are_grouped_and_readers_of_the_result_are_not() -> None:
    captured = autopipe.capture(Writes(), (torch.randn(3, 4),))
    group = {n.name: n.meta.get("group") for n in captured.nodes}
    assert group["inner"] == group["relu"] is not None
    assert group["outer"] is None


def test_tied_parameters_are_one_name() -> None:
    model, args, _, target, loss_fn = make("gpt", 2)
    captured = autopipe.capture(model, args, loss_fn=loss_fn, target=target)
    assert captured.names["head.weight"] == captured.names["wte.weight"] == "wte.weight"


def test_a_guard_raises_where_the_value_differs() -> None:
    captured = autopipe.capture(Reads(), (torch.ones(3, 4),))
    assert captured.route == "guarded"
    with pytest.raises(RuntimeError, match="gave True, and now it gives False"):
        captured(-torch.ones(3, 4))


class PythonRandom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        import time

        return self.linear(x) * (time.perf_counter_ns() % 1000)


def test_the_self_check_catches_python_that_differs_from_call_to_call() -> None:
    with pytest.raises(autopipe.CaptureError, match=r"differs from the model in output 0.*test_capture.py:\d+"):
        autopipe.capture(PythonRandom(), (torch.randn(3, 4),))


class Escapes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


def test_a_refusal_names_module_file_and_line() -> None:
    model = Escapes()
    with pytest.raises(autopipe.CaptureError, match=r"module '' \(Escapes\).*numpy.*test_capture.py:\d+.*remedy"):
        autopipe.capture(model, (torch.randn(3, 4),))


class PicksRows(nn.Module):
    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return x[torch.arange(len(rows)), rows] if rows.dtype != torch.bool else x[rows]


def test_an_index_of_numbers_leaves_nothing_to_be_guarded() -> None:
    captured = autopipe.capture(PicksRows(), (torch.randn(3, 4), torch.tensor([0, 2, 1])))
    assert captured.route == "recorded" and not captured.opaque and not captured.guards


def test_a_language_model_of_transformers_is_recorded_whole() -> None:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    ids = torch.zeros(2, 8, dtype=torch.long)
    captured = autopipe.capture(model, (), {"input_ids": ids, "labels": ids})
    assert captured.route == "recorded" and not captured.opaque and not captured.guards


def test_arguments_that_do_not_fit_forward_are_told_so() -> None:
    with pytest.raises(autopipe.CaptureError, match=r"Escapes.forward\(\).*'y'.*\(x: .*\).*test_capture.py:\d+"):
        autopipe.capture(Escapes(), (torch.randn(3, 4),), {"y": 1})


def test_another_call_is_refused() -> None:
    captured = autopipe.capture(ReturnsDataclass(), (torch.randn(3, 4),), {"scale": 0.5})
    with pytest.raises(autopipe.CaptureError, match=r"scale = 2\.0"):
        captured(torch.randn(3, 4), scale=2.0)


def test_a_model_on_the_meta_device_is_captured() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    captured = autopipe.capture(model, (torch.randn(3, 4),))
    assert [n.op for n in captured.nodes] == ["call_module"] * 3


class CountsTokens(nn.Module):
    """Gives numbers that it has read from values, by a way that no operator shows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, list[int]]:
        chosen = self.gate(x).argmax(dim=1)
        return chosen.argsort(stable=True), (chosen[:, None] == torch.arange(2)).sum(0).tolist()


class SplitsTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count, self.experts = CountsTokens(), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        order, sizes = self.count(x)
        parts = x[order].split(sizes)
        out = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(x).index_copy(0, order, out)


@pytest.mark.parametrize("check", [True, False])
def test_numbers_that_a_module_reads_from_values_are_never_kept_as_they_were(check: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), SplitsTokens(), nn.Linear(4, 4))
    captured = autopipe.capture(model, (torch.randn(12, 4),), check=check)
    assert captured.opaque.keys() == {"1"}
    for seed in range(6):
        x = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(captured(x), model(x), atol=1e-6)
