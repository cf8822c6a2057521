"""`profiler.profile`: times, names, errors, and that it leaves everything as it was."""

from __future__ import annotations

import copy
import json
import operator
import random
import statistics
import time

import pytest
import torch
from torch import Tensor, fx, nn

import profiler
from profiler import ProfileError
from profiler.nodes import NodeTimer
from tests.models.graphs import Block, Gpt, cases, quick

CASES = cases()
pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


@pytest.mark.parametrize("name", CASES)
def test_every_compute_node_has_a_measured_row(name):
    model, args = CASES[name]
    traced = fx.symbolic_trace(model)
    profile = quick(traced, args)
    names = [n.name for n in traced.graph.nodes if n.op.startswith("call_")]
    assert [n.name for n in profile.nodes] == names
    assert all(n.measured and n.forward_us > 0 for n in profile.nodes)
    assert profile.device == "cpu" and profile.dtype == "float32" and profile.microbatch_size == args[0].shape[0]
    assert profiler.Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


@pytest.mark.parametrize("name", CASES)
def test_everything_is_left_as_it_was(name):
    model, args = CASES[name]
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    state = {k: v.clone() for k, v in model.state_dict().items()}
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    inputs = [a.clone() for a in args]
    model.head.eval() if hasattr(model, "head") else None
    modes = [m.training for m in model.modules()]
    rng, python = torch.get_rng_state(), random.getstate()
    quick(model, args)
    assert torch.equal(rng, torch.get_rng_state()) and python == random.getstate()
    assert modes == [m.training for m in model.modules()]
    assert versions == [t._version for t in (*model.parameters(), *model.buffers())]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(args, inputs, strict=True))
    for p, (grad, copied) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad and (grad is None or torch.equal(grad, copied))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_totals_are_near_the_plain_models():
    model, ids = Gpt(layers=4, width=128, vocabulary=512, length=64), torch.randint(0, 512, (4, 64))
    ratios = []
    for _ in range(5):  # the machine may be busy with something else at any time
        profile = quick(model, (ids, ids), budget_s=3.0)
        forward, backward = zip(*(timed(model, ids) for _ in range(15)), strict=True)
        ratios.append(sum(n.forward_us for n in profile.nodes) / statistics.median(forward))
        ratios.append(sum(n.backward_us for n in profile.nodes) / statistics.median(backward))
        if all(0.5 < r < 2.0 for r in ratios[-2:]):
            return
    raise AssertionError(ratios)


def timed(model, ids):
    """Time of this thread alone: nodes are too short to be interrupted often, a whole model is not."""
    start = time.thread_time()
    loss = model(ids, ids)
    middle = time.thread_time()
    loss.backward()
    return (middle - start) * 1e6, (time.thread_time() - middle) * 1e6


def counted(monkeypatch):
    measured = []
    original = NodeTimer.measure
    monkeypatch.setattr(
        NodeTimer, "measure", lambda self, call, *args: measured.append(call.node.name) or original(self, call, *args)
    )
    return measured


def test_each_signature_is_measured_once(monkeypatch):
    measured, counts = counted(monkeypatch), []
    for layers in (1, 2, 6):
        measured.clear()
        ids = torch.randint(0, 211, (2, 32))
        quick(Gpt(layers=layers), (ids, ids))
        counts.append(len(measured))
    assert counts[0] == counts[1] == counts[2] or counts[1] == counts[2] <= counts[0] + 2


def test_what_changes_the_cost_changes_the_signature(monkeypatch):
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight.requires_grad_(False)
            self.d, self.e = nn.Dropout(0.1), nn.Dropout(0.2)

        def forward(self, x):
            a, b, c = self.a(x), self.b(x), self.c(x)
            d, e = self.d(a), self.e(a)
            f, g = torch.mul(a, a), torch.mul(a, c)
            return a + b + c + d + e + f + g + a.t().sum(0, keepdim=True).t()[:8]

    measured = counted(monkeypatch)
    quick(Pairs(), (torch.randn(8, 8),))
    assert {"a", "b", "d", "e", "mul", "mul_1"} <= set(measured) and "c" not in measured
    assert len([m for m in measured if m.startswith("add")]) < 7


def test_modules_inputs_and_tied_parameters():
    model, args = CASES["gpt"]
    profile = quick(model, args)
    by_name = {n.name: n for n in profile.nodes}
    assert by_name["embed"].params == by_name["head"].params == ("embed.weight",)
    assert by_name["head"].param_bytes == 211 * 64 * 4 == profile.parameters["embed.weight"].bytes
    assert "head.weight" not in profile.parameters
    assert by_name["position"].params == ("position.weight", "index")[:1] or "index" in by_name["position"].params
    assert by_name["blocks_0_qkv"].module == "blocks.0.qkv"
    assert by_name["blocks_0_qkv"].inputs == ("blocks_0_norm1",) and by_name["embed"].inputs == ()
    assert not profile.parameters["index"].trainable
    renamed = quick(model, args, names={"embed.weight": "shared", "head.weight": "shared"})
    assert {n.params for n in renamed.nodes if n.name in ("embed", "head")} == {("shared",)}


def test_frozen_parameters_and_integers_are_not_differentiable():
    model, args = CASES["frozen"]
    by_name = {n.name: n for n in quick(model, args).nodes}
    assert not by_name["first"].differentiable and by_name["first"].backward_us == 0
    assert by_name["second"].differentiable and by_name["second"].backward_us > 0
    assert not by_name["argmax"].differentiable and by_name["argmax"].output_bytes == 5 * 6 * 8


def test_forward_only():
    model, args = CASES["convolutional"]
    profile = quick(copy.deepcopy(model).eval(), args, train=False)
    assert all(n.backward_us == 0 and n.saved_bytes == 0 and not n.differentiable for n in profile.nodes)


def regions(enter):
    """x → linear → (inside a region: linear) → sum."""
    root = nn.Module()
    root.a, root.b = nn.Linear(32, 32), nn.Linear(32, 32)
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_module("a", (x,))
    leave = enter(graph)
    b = graph.call_module("b", (a,))
    leave()
    graph.output((graph.call_module("b", (a,)), b))
    return fx.GraphModule(root, graph)


def test_no_grad_region():
    def enter(graph):
        graph.call_function(torch._C._set_grad_enabled, (False,))
        return lambda: graph.call_function(torch._C._set_grad_enabled, (True,))

    inside, outside = quick(regions(enter), (torch.randn(8, 32),)).nodes[1:]
    assert (inside.differentiable, outside.differentiable) == (False, True)
    assert inside.backward_us == 0 < outside.backward_us


def test_autocast_region():
    def enter(graph):
        context = graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, True))
        return lambda: graph.call_function(torch.amp.autocast_mode._exit_autocast, (context,))

    inside, outside = quick(regions(enter), (torch.randn(8, 32),)).nodes[1:]
    assert (inside.output_bytes, outside.output_bytes) == (8 * 32 * 2, 8 * 32 * 4)
    assert not torch.is_autocast_enabled("cpu")


def test_group_and_hash_are_copied():
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    next(n for n in traced.graph.nodes if n.op == "call_module").meta["group"] = "g0"
    profile = quick(traced, (torch.randn(2, 4),), graph_hash="abc")
    assert [n.group for n in profile.nodes] == ["g0", None] and profile.graph_hash == "abc"


class FromMask(nn.Module):
    """Its shapes depend on values: the third block picks rows by what the first two computed."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).abs() + 1
        torch._assert((x > 0).all(), "positive")
        return x[x.sum(-1) > 0]


def test_a_node_that_needs_true_values_gets_them():
    assert len(quick(FromMask(), (torch.randn(4, 8),)).nodes) > 10


def test_a_plain_attribute_and_a_stateful_module():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.linear = 0, nn.Linear(4, 4)

        def forward(self, x):
            self.calls += 1
            return self.linear(x) * self.calls

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, Counter) or super().is_leaf_module(m, name)

    model = nn.Sequential(Counter(), nn.ReLU(), Counter())
    traced = fx.GraphModule(model, Tracer().trace(model))
    first = quick(traced, (torch.randn(2, 4),)).nodes[0]
    assert model[0].calls == 0 and first.params == ("0.linear.weight", "0.linear.bias")


def test_a_failing_node_is_named():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))

        def forward(self, x):
            return self.inner(x)

    with pytest.raises(ProfileError) as caught:
        quick(Bad(), (torch.randn(2, 4),))
    text = str(caught.value)
    assert "inner_1" in text and "inner.1" in text and "float32[2, 4]" in text and "remedy" in text
    assert caught.value.__cause__ is not None


def test_a_failing_backward_is_named():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            raise ValueError("no gradient today")

    def broken(x: Tensor) -> Tensor:  # from torch 2.14 fx finds no module for the inherited `apply` itself
        return Broken.apply(x)

    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(broken, (graph.call_module("a", (x,)),)))
    root = nn.Module()
    root.a = nn.Linear(4, 4)
    with pytest.raises(ProfileError, match=r"measured.*no gradient today"):
        quick(fx.GraphModule(root, graph), (torch.randn(2, 4),))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"device": "cuda:7"}, "cuda:7"),
        ({"device": "h100"}, "profiler.estimate"),
        ({"device": "meta"}, "meta"),
        ({"relative_error": 0.0}, "relative_error"),
        ({"budget_s": float("nan")}, "budget_s"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ProfileError, match=text):
        quick(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),), **arguments)


def test_missing_inputs_and_empty_graphs():
    with pytest.raises(ProfileError, match="0 input values; expected 1"):
        quick(nn.Sequential(nn.Linear(4, 4)), ())
    with pytest.raises(ProfileError, match="2 input values; expected 1"):
        quick(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),) * 2)
    with pytest.raises(ProfileError, match="without compute nodes"):
        quick(fx.symbolic_trace(lambda x: x), (torch.ones(1),))


def test_inputs_are_made_up_from_what_capture_noted():
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    next(iter(traced.graph.nodes)).meta["val"] = torch.empty(3, 4, device="meta")
    assert quick(traced, ()).microbatch_size == 3


def test_spread_and_budget():
    traced, args = fx.symbolic_trace(Block(64)), (torch.randn(2, 16, 64),)
    start = time.perf_counter()
    profile = quick(traced, args, relative_error=1e-9, budget_s=1.0)
    assert time.perf_counter() - start < 10 and any(n.spread > 0 for n in profile.nodes)


def test_the_models_own_output_is_unchanged():
    model, (x,) = copy.deepcopy(CASES["convolutional"][0]).eval(), CASES["convolutional"][1]
    before = model(x)
    quick(model, (x,))
    assert torch.equal(before, model(x))


def test_writing_functions_leave_parameters_and_inputs_alone():
    root = nn.Module()
    root.weight = nn.Parameter(torch.ones(4), requires_grad=False)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(operator.setitem, (x, slice(0, 2), 7.0))
    view = graph.call_method("view", (graph.get_attr("weight"), 2, 2))
    graph.call_method("mul_", (view, 3.0))
    graph.output(graph.call_function(operator.iadd, (x, 1.0)))
    arg = torch.zeros(4)
    profile = quick(fx.GraphModule(root, graph), (arg,))
    assert arg.eq(0).all() and root.weight.eq(1).all() and root.weight._version == 0
    assert [n.output_bytes for n in profile.nodes] == [0, 16, 16, 16]


def test_a_transformers_model_that_torch_export_captured():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=97, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.randint(0, 97, (2, 16))
    graph_module = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False).module()
    profile = quick(graph_module, (ids, False))
    head = next(n for n in profile.nodes if "lm_head.weight" in n.params or "transformer.wte.weight" in n.params)
    assert head.param_bytes == 97 * 32 * 4
    assert sum(n.backward_us for n in profile.nodes) > 0 and all(n.forward_us > 0 for n in profile.nodes)
