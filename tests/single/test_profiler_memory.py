"""Saved, output and workspace bytes, against what autograd and the allocator do by themselves."""

from __future__ import annotations

import copy
import gc
from contextlib import contextmanager

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import profiler
from profiler.memory import peak_memory
from tests.models.graphs import Gpt, cases

CASES = cases()


def profile_of(model, args):
    traced = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    return profiler.profile(traced, args, budget_s=0.2, progress=False, cache=False)


def held_bytes(model, args):
    """Bytes that a plain forward keeps for backward: each storage once, without parameters, buffers and inputs."""
    outside = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *args)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in outside:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*args)
    return sum(s.nbytes() for s in kept.values())


@pytest.mark.parametrize("name", CASES)
def test_saved_bytes_are_those_of_the_plain_model(name):
    model, args = CASES[name]
    profile = profile_of(model, args)
    assert sum(n.saved_bytes for n in profile.nodes) == held_bytes(copy.deepcopy(model), args)


@pytest.mark.parametrize("layers", [1, 3, 7])
def test_saved_bytes_of_replayed_layers(layers):
    model, ids = Gpt(layers=layers), torch.randint(0, 211, (2, 32))
    assert sum(n.saved_bytes for n in profile_of(model, (ids, ids)).nodes) == held_bytes(model, (ids, ids))


class Sharing(nn.Module):
    """Several savers of one storage, views of it, an output that its own backward needs, a mask, a scalar."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 12)

    def forward(self, x):
        h = self.linear(x)
        e = h.exp()
        a, b = e.chunk(2, -1)
        c = a * b + e[:, :6].sin()
        d = nn.functional.dropout(c, 0.5, True)
        return (d * 3.0 + d.view(-1).reshape(d.shape).cos()).softmax(-1), h.t().contiguous().relu()


def test_each_storage_is_charged_once_to_its_maker():
    model, args = Sharing(), (torch.randn(4, 10),)
    profile = profile_of(model, args)
    assert sum(n.saved_bytes for n in profile.nodes) == held_bytes(model, args)
    by_name = {n.name: n for n in profile.nodes}
    assert by_name["exp"].saved_bytes == 4 * 12 * 4  # kept by exp, mul and sin
    assert by_name["linear"].saved_bytes == 0  # the input is the model's, the output is kept by nobody
    assert by_name["chunk"].saved_bytes == by_name["getitem"].saved_bytes == 0
    assert by_name["dropout"].saved_bytes == 2 * 4 * 6 * 4  # its mask, and its output for cos


def test_output_bytes_count_what_would_be_sent():
    class Views(nn.Module):
        def forward(self, x):
            return x[:, :2].expand(3, 4, 2), x.split(2, 1)

    by_name = {n.name: n for n in profile_of(Views(), (torch.randn(4, 6),)).nodes}
    assert by_name["getitem"].output_bytes == 4 * 2 * 4
    assert by_name["expand"].output_bytes == 3 * 4 * 2 * 4
    assert by_name["split"].output_bytes == 4 * 6 * 4


def test_workspace_holds_the_gradients_and_the_inside():
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Conv1d(8, 8, 3)), torch.randn(8, 64, requires_grad=True)
    linear, conv = profile_of(model, (x,)).nodes
    sizes = 8 * 64 * 4
    # backward of a linear layer: the gradient given (8 × 64), those of input and weight
    assert linear.workspace_bytes == sizes + sizes + 64 * 64 * 4
    assert conv.workspace_bytes >= 8 * 62 * 4 + sizes


def test_autocast_keeps_casts():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)

        def forward(self, x):
            return self.b(self.a(x).relu()).float().sum()

    model, args = Cast(), (torch.randn(4, 16),)
    traced = fx.symbolic_trace(model)
    with torch.autocast("cpu", torch.bfloat16):
        profile = profile_of(traced, args)
        assert torch.is_autocast_enabled("cpu")
        assert sum(n.saved_bytes for n in profile.nodes) == held_bytes(model, args)


class Segment(nn.Module):
    def forward(self, x, weight):
        return (x @ weight).tanh().exp()


def test_checkpoint_keeps_its_inputs_only():
    root = nn.Module()
    root.weight, root.linear, root.segment = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8), Segment()
    graph = fx.Graph()
    h = graph.call_module("linear", (graph.placeholder("x"),))
    inner = graph.get_attr("segment")
    y = graph.call_function(checkpoint, (inner, h, graph.get_attr("weight")), {"use_reentrant": False})
    graph.output(y)
    by_name = {n.name: n for n in profile_of(fx.GraphModule(root, graph), (torch.randn(4, 8),)).nodes}
    assert by_name["linear"].saved_bytes == 4 * 8 * 4 and by_name["checkpoint"].saved_bytes <= 64
    assert by_name["checkpoint"].backward_us > by_name["checkpoint"].forward_us * 0.5


def test_nodes_that_capture_marked_as_checkpointed():
    class Checkpointed(Gpt):
        def forward(self, ids, target):
            x = self.embed(ids) + self.position(self.index)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), target.flatten())

    model, ids = Gpt(layers=3), torch.randint(0, 211, (2, 32))
    traced = fx.symbolic_trace(model)
    plain = {n.name: n for n in profile_of(traced, (ids, ids)).nodes}
    for node in traced.graph.nodes:
        block = next((name for name in node.meta.get("nn_module_stack", ()) if name.startswith("blocks.")), None)
        if block is not None:
            node.meta["checkpoint"] = block
    again = {n.name: n for n in profile_of(traced, (ids, ids)).nodes}
    other = Checkpointed(layers=3)
    assert sum(n.saved_bytes for n in again.values()) == held_bytes(other, (ids, ids))
    assert (
        again["blocks_1_qkv"].backward_us > plain["blocks_1_qkv"].backward_us * 0.5 + again["blocks_1_qkv"].forward_us
    )


def test_nothing_that_is_made_while_memory_is_measured_outlives_it(monkeypatch):
    """torch remembers the address of a block that outlives a measurement, and counts as released whatever lies there
    later."""
    outliving = []

    def tensors():
        return {id(o): o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}

    @contextmanager
    def monitored(device):
        before = set(tensors())
        with peak_memory(device) as peak:
            yield peak
        outliving.extend(tuple(t.shape) for i, t in tensors().items() if i not in before)

    monkeypatch.setattr("profiler.nodes.peak_memory", monitored)
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(2)], nn.GELU(), nn.BatchNorm1d(64))
    assert len(profile_of(model, (torch.randn(32, 64, requires_grad=True),)).nodes) == 4
    assert not outliving


def test_the_parts_of_a_block_begin_at_their_own_level():
    with peak_memory(torch.device("cpu")) as peak:
        a = torch.empty(1000, dtype=torch.uint8)
        peak.split()
        b = torch.empty(500, dtype=torch.uint8)
        del b
        peak.split()
        del a
        c = torch.empty(700, dtype=torch.uint8)
        del c
    assert [peak.within(i) for i in range(3)] == [1000, 500, 0]
    assert peak.num_bytes == 1500
