"""The backward in two parts gives the gradients of the backward in one, bit for bit, and does nothing twice that must
not be."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopipe
from autopipe.engine.step import split_backward
from autopipe.engine.step.split_backward import Division, division_of, input_gradients
from autopipe.stages import cut as cut_stages
from autopipe.stages import stage_module

calls: list[str] = []


class Scale(torch.autograd.Function):
    """x * w, counting its backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        calls.append("scale")
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).sum(0)


class Stage(nn.Module):
    """A stage with two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.w, self.table = nn.LayerNorm(6), nn.Parameter(torch.randn(6)), nn.Embedding(5, 6)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError


class Plain(Stage):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        h = self.conv(self.norm(torch.tanh(self.a(x)))[:, None]).sum(1)
        return self.b(h) + y, h * self.w


class TiedInside(Stage):
    """One weight at two places, and one that is normalised before it is used."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        h = self.a(torch.tanh(self.a(x)))
        w = self.b.weight / self.b.weight.norm()
        return F.linear(h, w) + F.linear(y, self.c.weight), h


class Custom(Stage):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return Scale.apply(self.a(x), self.w) + self.b(y), self.c(x)


class Beside(Stage):
    """The second output does not depend on the inputs; nor does the embedding that is added."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        e = torch.tanh(self.table.weight[:4] @ self.b.weight)
        return self.a(x) + e, self.c(e)


class OneInput(Stage):
    """The second input is not used."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return self.a(x), self.b(x.detach())


class Fused(Stage):
    """Nodes with several outputs on the path."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        one, two, _ = F.linear(x, torch.cat([self.a.weight, self.b.weight, self.c.weight])).chunk(3, dim=-1)
        return one * self.w, torch.max(two + y * self.w, dim=1).values


MODELS = (Plain, TiedInside, Custom, Beside, OneInput, Fused)


def _gradients(stage: nn.Module, inputs: list[Tensor], used: tuple[int, ...], *, divided: bool) -> list[Any]:
    outputs = stage(*inputs)
    roots = [outputs[i] for i in used]
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(r.shape, generator=generator) for r in roots]
    if divided:
        rest = input_gradients(roots, given, [i for i in inputs if i.requires_grad], Division())
        before = [None if i.grad is None else i.grad.clone() for i in inputs]
        rest.run()
        assert all(b is None if i.grad is None else torch.equal(b, i.grad) for b, i in zip(before, inputs, strict=True))
    else:
        torch.autograd.backward(roots, given)
    return [p.grad for p in [*inputs, *stage.parameters()]]


@pytest.fixture(params=["start at each junction", "call each junction"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "call each junction":
        monkeypatch.setattr(split_backward, "SHORT_PATH", 0)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("leaves", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_equal_those_of_the_whole_backward(
    kind: type[Stage], leaves: tuple[bool, bool], used: tuple[int, ...]
) -> None:
    stage = kind()
    inputs = [torch.randn(4, 6).requires_grad_(leaf) for leaf in leaves]
    twin, twin_inputs = copy.deepcopy(stage), [i.detach().clone().requires_grad_(i.requires_grad) for i in inputs]
    expected = _gradients(twin, twin_inputs, used, divided=False)
    calls.clear()
    found = _gradients(stage, inputs, used, divided=True)
    assert calls == ["scale"] * (kind is Custom and 0 in used)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.usefixtures("either_way")
def test_the_first_part_leaves_weight_gradients_to_the_second() -> None:
    stage, x = Plain(), torch.randn(4, 6, requires_grad=True)
    outputs = stage(x, torch.randn(4, 6))
    rest = input_gradients(outputs, [torch.ones_like(o) for o in outputs], [x], Division())
    assert x.grad is not None
    assert all(m.weight.grad is None and m.bias.grad is None for m in (stage.a, stage.b, stage.conv))
    rest.run()
    assert all(m.weight.grad is not None and m.bias.grad is not None for m in (stage.a, stage.b, stage.conv))


def _second_part_s(num_layers: int) -> float:
    """Processor time of the second part of a chain of small layers, the least of five."""
    layers, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_layers))), torch.randn(2, 4, requires_grad=True)
    times = []
    for _ in range(5):
        y = layers(x)
        rest = input_gradients([y], [torch.ones_like(y)], [x], Division())
        start = time.process_time()
        rest.run()
        times.append(time.process_time() - start)
    return min(times)


def test_the_second_part_takes_a_time_that_grows_with_the_length_of_the_stage_and_not_with_its_square() -> None:
    _second_part_s(10)
    assert _second_part_s(1600) < 16 * 4 * _second_part_s(100)


@pytest.mark.usefixtures("either_way")
def test_gradients_have_the_dtype_of_their_parameters() -> None:
    """A node may give another, which autograd converts: here of a float64 product with a float32 parameter."""
    w, x = torch.randn(3, requires_grad=True), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = x * w
    input_gradients([y], [torch.ones_like(y)], [x], Division()).run()
    assert w.grad is not None
    assert torch.equal(w.grad, x.detach().sum(0).float())


class Region(nn.Module):
    """A checkpoint region between two layers, which counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.count: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.utils.checkpoint.checkpoint(self.inside, self.a(x), use_reentrant=False))

    def inside(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(self.c(torch.tanh(self.b(x)))), 0.3)


@pytest.mark.usefixtures("either_way")
def test_a_checkpoint_region_is_computed_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Region()
    captured = autopipe.capture(model, (torch.randn(4, 6),))
    stage = stage_module(captured, cut_stages(captured, dict.fromkeys((n.name for n in captured.nodes), 0), 1)[0])
    division = division_of(stage)
    inside = {*model.b.parameters(), *model.c.parameters()}
    assert division.with_inputs == inside
    x = torch.randn(4, 6, requires_grad=True)
    (y,) = stage(x)
    count = 0

    def counted(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        return forward(self, *args)

    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", counted)
    rest = input_gradients([y], [torch.ones_like(y)], [x], division)
    assert count == 2
    assert model.a.weight.grad is None
    rest.run()
    assert count == 2
    assert all(p.grad is not None for p in model.parameters())


def test_a_stage_with_backward_hooks_is_not_divided() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h.register_hook(lambda g: 2 * g)
            return self.b(h)

    model = Hooked()
    captured = autopipe.capture(model, (torch.randn(4, 6),))
    stage = stage_module(captured, cut_stages(captured, dict.fromkeys((n.name for n in captured.nodes), 0), 1)[0])
    assert division_of(stage).whole
    x = torch.randn(4, 6)
    twin = copy.deepcopy(model)
    twin(x).sum().backward()
    (y,) = stage(x)
    input_gradients([y], [torch.ones_like(y)], [x.requires_grad_()], division_of(stage)).run()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad)
