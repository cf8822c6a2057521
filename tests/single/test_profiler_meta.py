"""Models without values: parameters are made a node at a time, and the rows are those of the same model with values."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import fx, nn

import profiler
from profiler import tensors as tensors_file
from profiler import walk
from profiler.nodes import NodeTimer
from tests.models.graphs import Gpt, cases

MEASURED = ("forward_us", "backward_us", "spread", "workspace_bytes")


def rows(model, args):
    found = profiler.profile(fx.symbolic_trace(model), args, device="cpu", budget_s=0.2, progress=False, cache=False)
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in found.to_json()["nodes"]], found


@pytest.mark.parametrize("name", ["gpt", "convolutional", "recurrent"])
def test_rows_equal_those_of_the_model_with_values(name):
    model, args = cases()[name]
    expected, _ = rows(model, args)
    model = model.to("meta")
    if name == "gpt":
        model.head.weight = model.embed.weight  # `to` unties
    found, profile = rows(model, args)
    assert found == expected
    assert all(p.device.type == "meta" for p in model.parameters())
    assert all(n.measured and n.forward_us > 0 for n in profile.nodes)
    assert rows(model, tuple(a.to("meta") for a in args))[0] == expected


def test_one_nodes_parameters_exist_at_a_time(monkeypatch):
    alive, most = 0, 0
    original = tensors_file.fill_random

    def counted(tensor):
        nonlocal alive, most
        if tensor.numel() >= 256 * 256:
            alive += 1
            most = max(most, alive)
            weakref.finalize(tensor.untyped_storage(), released)
        return original(tensor)

    def released():
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(tensors_file, "fill_random", counted)
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(256, 256, bias=False), nn.Linear(256, 300), nn.Linear(300, 256), nn.Linear(256, 512)
        )
    profiler.profile(
        fx.symbolic_trace(model),
        (torch.randn(2, 256),),
        device="cpu",
        budget_s=0,
        progress=False,
        calibrate=False,
        cache=False,
    )
    assert most == 1


def test_devices_that_the_graph_names_are_replaced():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 4, device="meta")

        def forward(self, x):
            return self.embed(x) + self.embed(torch.arange(3, device=torch.device("meta")))

    traced = fx.symbolic_trace(Positions())
    with traced.graph.inserting_before(next(n for n in traced.graph.nodes if n.op == "call_module")):
        arange = traced.graph.call_function(torch.arange, (3,), {"device": torch.device("meta")})
    modules = [n for n in traced.graph.nodes if n.op == "call_module"]
    modules[1].args = (arange,)
    profile = profiler.profile(traced, (torch.tensor([1, 2, 3]),), progress=False, cache=False)
    assert profile.device == "cpu" and {"arange"} <= {n.name for n in profile.nodes}


def test_a_deep_model_costs_what_a_shallow_one_costs(monkeypatch):
    """As many nodes are run, and as many measured, of 48 layers as of 2."""
    run, measured = [], []
    run_traced, measure = walk.run_traced, NodeTimer.measure
    monkeypatch.setattr(walk, "run_traced", lambda call, *rest: (run.append(call.node), run_traced(call, *rest))[1])
    monkeypatch.setattr(
        NodeTimer, "measure", lambda self, call, *rest: (measured.append(call.node), measure(self, call, *rest))[1]
    )
    counts = []
    for layers in (2, 48):
        model, ids = Gpt(layers=layers, width=128), torch.randint(0, 211, (4, 32))
        traced = fx.symbolic_trace(model)
        profile = profiler.profile(traced, (ids, ids), budget_s=2.0, progress=False, calibrate=False, cache=False)
        assert len(profile.nodes) > 20 * layers
        counts.append((len(run), len(measured)))
        run.clear(), measured.clear()
    assert counts[0] == counts[1] and 0 < counts[0][1] < 40
