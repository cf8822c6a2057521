"""Segments: timed on values that they can run on, kept in the profile, and what scales the times of their nodes."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from profiler.calibrate import calibrated
from profiler.nodes import NodeTimer
from profiler.records import NodeProfile, SegmentProfile
from profiler.tensors import ModelTensors
from profiler.walk import Walk
from tests.models.graphs import Gpt, quick

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


def test_segments_get_true_values_where_they_need_them():
    def as_recorded(x):
        if x.item() != 2.0:
            raise RuntimeError("another value")
        return x

    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.mean, (graph.call_function(torch.mul, (x, 2.0)),))
    graph.output(graph.call_function(torch.mul, (x, graph.call_function(as_recorded, (first,)))))
    profile = quick(fx.GraphModule(nn.Module(), graph), (torch.ones(8, 8),))
    assert len(profile.nodes) == 4 and profile.segments


def test_segments_scale_the_times_of_their_nodes():
    graph = fx.Graph()
    x = graph.placeholder("x")
    for name in ("a", "b", "c", "d"):
        x = graph.create_node("call_function", torch.relu, (x,), name=name)
    graph.output(x)
    rows = [
        NodeProfile(name=name, inputs=(), forward_us=10.0, backward_us=20.0, output_bytes=4)
        for name in ("a", "b", "c", "d")
    ]
    segments = [
        SegmentProfile(
            first="a", last="b", forward_us=40.0, backward_us=20.0, nodes_forward_us=20.0, nodes_backward_us=40.0
        ),
        SegmentProfile(
            first="d", last="d", forward_us=10.0, backward_us=20.0, nodes_forward_us=10.0, nodes_backward_us=20.0
        ),
    ]
    found = [(n.forward_us, n.backward_us) for n in calibrated(graph, rows, segments)]
    overall = 10.0 * 50 / 30, 20.0 * 40 / 60
    assert found[0] == found[1] == (20.0, 10.0) and found[2] == pytest.approx(overall) and found[3] == (10.0, 20.0)
    assert calibrated(graph, rows, []) == rows


def test_a_calibrated_profile_keeps_its_segments():
    ids = torch.randint(0, 211, (2, 32))
    profile = quick(Gpt(layers=3), (ids, ids))
    names = [n.name for n in profile.nodes]
    assert 2 <= len(profile.segments) <= 4
    assert names.index(profile.segments[0].first) == 0
    first = profile.segments[0]
    inside = profile.nodes[: names.index(first.last) + 1]
    assert sum(n.forward_us for n in inside) == pytest.approx(first.forward_us)
    assert sum(n.backward_us for n in inside) == pytest.approx(first.backward_us)
    assert quick(Gpt(layers=3), (ids, ids), calibrate=False).segments == ()


def test_floats_that_count_something_are_never_made_up():
    """How many tokens each expert gets is a float until it is cast; random numbers in its place would make its readers
    do less."""
    true_counts = torch.tensor([1.0, 2.0, 0.0, 5.0])

    def reader(x, counts):
        if not torch.equal(counts, true_counts):
            raise RuntimeError("made up")
        return x + 1

    graph = fx.Graph()
    x, ids = graph.placeholder("x"), graph.placeholder("ids")
    for _ in range(2):
        counts = graph.call_function(
            torch.histc, (graph.call_method("float", (ids,)),), {"bins": 4, "min": 0, "max": 3}
        )
        x = graph.call_function(reader, (graph.call_function(torch.mul, (x, 2.0)), counts))
    graph.output(x)
    model, records, timer = fx.GraphModule(nn.Module(), graph), {}, NodeTimer(torch.device("cpu"), 0.5)

    def seen():
        """Whether anything was made up, and what the readers of counts were given."""
        tensors = ModelTensors(model, torch.device("cpu"))
        inputs, values = [torch.randn(4, 4), torch.tensor([0, 1, 1, 3, 3, 3, 3, 3])], {}
        walk = Walk(model, inputs, torch.device("cpu"), tensors, timer.measure, Kept(records), 1.0)

        def arriving(node):
            values.update((a.name, walk.real_output(a)) for a in node.all_input_nodes if a.name.startswith("histc"))
            return True

        walk.run(lambda visit: None, arriving)
        return walk.made_up, list(values.values())

    seen()
    made_up, given = seen()  # all nodes are known now, and those that may be made up are not run
    assert made_up and len(given) == 2 and all(torch.equal(v, true_counts) for v in given)


class Kept:
    """Records in a dictionary."""

    def __init__(self, found):
        self._found = found

    def get(self, signature):
        return self._found.get(signature)

    def put(self, signature, record):
        self._found[signature] = record
