"""The expected peak of a stage, against levels that were counted by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from autopipe.cost import DEFAULT_LINK, build_cost_graph
from autopipe.partition.memory.expected_peak import expected_peak_bytes
from autopipe.partition.memory.model import MemoryModel, run_costs, stage_memory
from profiler.records import NodeProfile, ParameterProfile, Profile


def node(name: str, *inputs: str, **values: Any) -> NodeProfile:
    given = {"forward_us": 1.0, "backward_us": 2.0, "output_bytes": 100, "workspace_bytes": 200, **values}
    return NodeProfile(name=name, inputs=inputs, **given)


def peaks(
    nodes: list[NodeProfile],
    stage_of: list[int],
    *,
    num_microbatches: int = 1,
    buffered: bool = False,
    optimizer: float = 0.0,
    params: dict[str, int] | None = None,
) -> list[float]:
    sizes = {name: ParameterProfile(bytes=size, trainable=True) for name, size in (params or {}).items()}
    profile = Profile(nodes=tuple(nodes), parameters=sizes, device="cpu")
    graph = build_cost_graph(profile, dataclasses.replace(DEFAULT_LINK, buffered=buffered))
    memory, stages = MemoryModel(num_microbatches=num_microbatches, states=optimizer), np.array(stage_of)
    K = max(stage_of) + 1
    parts, costs = stage_memory(graph, memory, stages, K), run_costs(graph, memory, stages, K)
    return expected_peak_bytes(profile, graph, memory, parts, costs, stages).tolist()


CHAIN = [
    node("a", saved_bytes=100),  # b keeps it
    node("b", "a", saved_bytes=100, keeps=("a", "b")),  # its own result, as a ReLU does
    node("c", "b", output_bytes=4, workspace_bytes=104),
]


def test_what_is_kept_goes_with_the_last_node_that_keeps_it() -> None:
    # b's backward: a and b are kept, the gradient that came (100) is the one that b begins with, and b makes 100.
    # a's: b is held, since the engine has sent it; so is the gradient that came; a has a gradient and makes one.
    assert peaks(CHAIN, [0, 0, 1]) == [100 + 100 + 100 + 100, 100 + 104]
    # within one stage b's result goes with b: b's backward holds a, b, and two gradients
    assert peaks(CHAIN, [0, 0, 0])[0] == 100 + 100 + 200


def test_a_buffered_link_holds_nothing_for_messages_under_way() -> None:
    # The first stage holds two micro-batches; the second posts a receive ahead, and its last two gradients are still
    # being sent.
    held, alone = (
        peaks(CHAIN, [0, 0, 1], num_microbatches=4),
        peaks(CHAIN, [0, 0, 1], num_microbatches=4, buffered=True),
    )
    assert alone == [200 + 400, 100 + 104]
    assert held == [200 + 400 + 100, 100 + 104 + 100 + 200]


def test_the_gradient_of_a_parameter_is_made_by_its_last_reader() -> None:
    nodes = [
        node("a", params=("w",), param_bytes=1000),
        node("b", "a"),
        node("c", "b", params=("w",), param_bytes=1000),
    ]
    # In c's backward w's gradient is part of the workspace; in b's it is there, beside a and b, which may be kept, and
    # two gradients.
    assert peaks(nodes, [0, 0, 0], params={"w": 1000})[0] == 1000 + 1000 + 200 + 200


@pytest.mark.parametrize("states", [0.0, 2.0])
def test_adam_makes_two_tensors_like_the_largest_parameter(states: float) -> None:
    nodes = [node("a", params=("w",), param_bytes=1000), node("b", "a", params=("v",), param_bytes=10)]
    (peak,) = peaks(nodes, [0, 0], params={"w": 1000, "v": 10}, optimizer=states)
    static, gradients = 1010 * (1 + states), 1010
    assert peak == static + gradients + (2000 if states else 0)


def test_a_view_of_a_parameter_that_leaves_is_no_memory_of_the_stage() -> None:
    nodes = [
        node("t", params=("w",), param_bytes=1000, output_bytes=1000, views=("w",), workspace_bytes=1000),
        node("c", "t"),
    ]
    first, _ = peaks(nodes, [0, 1], params={"w": 1000})
    assert first == 1000 + 1000  # the parameter, and the gradient that came, which is handed on
