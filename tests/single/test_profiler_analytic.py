"""`profiler.estimate`: rooflines by hand, bytes equal to the measured ones, and errors."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import profiler
from profiler import DeviceSpec, ProfileError
from profiler.devices import DEVICES, efficiency_of
from tests.models.graphs import Gpt, cases

CASES = cases()


def estimate(model, args, **kwargs):
    return profiler.estimate(fx.symbolic_trace(model), args, **kwargs)


@pytest.mark.parametrize("name", CASES)
def test_bytes_and_names_are_those_of_a_measured_profile(name):
    model, args = CASES[name]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    measured = profiler.profile(fx.symbolic_trace(model), args, budget_s=0.1, progress=False, cache=False)
    estimated = estimate(model, args)
    fields = ["name", "inputs", "output_bytes", "params", "param_bytes", "module", "differentiable"]
    if name != "recurrent":  # oneDNN's LSTM keeps a workspace of its own; on fake tensors it is taken apart
        fields.append("saved_bytes")
    for field in fields:
        assert [getattr(n, field) for n in estimated.nodes] == [getattr(n, field) for n in measured.nodes], field
    assert not any(n.measured for n in estimated.nodes) and estimated.device == "h100"
    assert all((n.backward_us > 0) <= n.differentiable for n in estimated.nodes)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_linear_layer_by_hand():
    spec, share = DEVICES["a100"], efficiency_of(DEVICES["a100"])
    rows, inner, outer = 4096, 2048, 8192
    model = nn.Linear(inner, outer, bias=False, device="meta", dtype=torch.bfloat16)
    x = torch.empty(rows, inner, device="meta", dtype=torch.bfloat16, requires_grad=True)
    (node,) = estimate(nn.Sequential(model), (x,), device="a100").nodes
    one_us = 2 * rows * inner * outer / (spec.flops["bfloat16"] * share.matmul) * 1e6
    assert node.forward_us == pytest.approx(one_us)
    accumulate_us = 3 * inner * outer * 2 / (spec.bytes_per_s * share.memory) * 1e6
    assert node.backward_us == pytest.approx(2 * one_us + accumulate_us)


def test_memory_launch_and_views_by_hand():
    class Elementwise(nn.Module):
        def forward(self, x, small):
            return torch.add(x, 1.0).view(-1), small.exp()

    spec, share = DEVICES["h100"], efficiency_of(DEVICES["h100"])
    x = torch.empty(2**26, device="meta")
    add, view, exp = estimate(Elementwise(), (x, torch.empty(3))).nodes
    assert add.forward_us == pytest.approx(2 * 4 * 2**26 / (spec.bytes_per_s * share.memory) * 1e6)
    assert view.forward_us == 0 and exp.forward_us == share.launch_us
    assert add.backward_us == 0 and not add.differentiable


def test_attention_is_counted_and_causal_is_half():
    class Attention(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q, is_causal=True)

    q = torch.empty(2, 8, 4096, 64, dtype=torch.bfloat16, requires_grad=True)
    full, causal = estimate(Attention(), (q,)).nodes
    spec, share = DEVICES["h100"], efficiency_of(DEVICES["h100"])
    num_flops = 2 * 2 * 2 * 8 * 4096 * 4096 * 64
    assert full.forward_us == pytest.approx(num_flops / (spec.flops["bfloat16"] * share.attention) * 1e6)
    assert causal.forward_us == pytest.approx(full.forward_us / 2)
    assert full.saved_bytes < 2 * 8 * 4096 * 4096


def test_float32_uses_tf32_only_where_torch_may(monkeypatch):
    model, x = nn.Sequential(nn.Linear(4096, 4096, device="meta")), torch.empty(4096, 4096)
    plain = estimate(model, (x,)).nodes[0].forward_us
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert estimate(model, (x,)).nodes[0].forward_us < plain / 4


def test_a_large_model_on_meta_takes_seconds():
    with torch.device("meta"):
        model = Gpt(layers=24, width=2048, vocabulary=50_000, length=1024)
    ids = torch.zeros(1, 1024, dtype=torch.long)
    start = time.process_time()
    totals = {}
    for device in DEVICES:
        nodes = estimate(model, (ids, ids), device=device).nodes
        totals[device] = sum(n.forward_us + n.backward_us for n in nodes)
    assert time.process_time() - start < 30
    assert totals["h200"] <= totals["h100"] < totals["a100"] < totals["cpu"]


def test_forward_only():
    model, args = CASES["convolutional"]
    nodes = estimate(copy.deepcopy(model).eval(), args, train=False).nodes
    assert all(n.backward_us == 0 and n.saved_bytes == 0 for n in nodes)


def test_own_device():
    spec = DeviceSpec(name="mine", memory_bytes=2**30, flops={"float32": 1e12}, bytes_per_s=1e11)
    profile = estimate(nn.Sequential(nn.Linear(8, 8)), (torch.empty(2, 8),), device=spec)
    assert profile.device == "mine" and profile.nodes[0].forward_us > 0


@pytest.mark.parametrize(
    "device",
    [
        "h1000",
        DeviceSpec(name="x", memory_bytes=1, flops={}, bytes_per_s=1),
        DeviceSpec(name="x", memory_bytes=1, flops={"float32": 0.0}, bytes_per_s=1),
    ],
)
def test_devices_that_cannot_be(device):
    with pytest.raises(ProfileError, match=r"device.*remedy"):
        estimate(nn.Sequential(nn.Linear(8, 8)), (torch.empty(2, 8),), device=device)


def test_a_node_that_needs_values_is_named():
    class Selected(nn.Module):
        def forward(self, x):
            return x[torch.nonzero(x.sum(-1)).squeeze(-1)]

    with pytest.raises(ProfileError, match=r"'nonzero'.*remedy"):
        estimate(Selected(), (torch.ones(3, 4),))
    with pytest.raises(ProfileError, match="0 input values"):
        estimate(Selected(), ())
