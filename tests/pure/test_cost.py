"""The cost graph: contraction, tensors, parameters, and the costs of stages against plain loops over the profile."""

from __future__ import annotations

import numpy as np
import pytest

from autopipe.cost import build_cost_graph, stage_costs
from autopipe.partition.memory.model import MemoryModel, stage_memory
from autopipe.partition.timing import simulated_step_us
from profiler.records import LinkProfile, NodeProfile, Profile
from scenarios.random_profiles import random_profile
from tests.pure.partition_reference import loads_us, monotone_assignments, peaks_bytes, step_us

LINK = LinkProfile(latency_us=2.0, bytes_per_us=100.0, overlap=0.0)


def node(name: str, *inputs: str, group: str | None = None, **values: object) -> NodeProfile:
    return NodeProfile(
        name=name, inputs=inputs, group=group, forward_us=1.0, backward_us=2.0, output_bytes=10, **values
    )


def chosen(profile: Profile, num_stages: int, seed: int) -> dict[str, int]:
    """One monotone assignment out of the first few hundred."""
    found = [stage for stage, _ in zip(monotone_assignments(profile, num_stages), range(300), strict=False)]
    return found[seed * 7 % len(found)]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("overlap", [0.0, 0.4, 1.0])
def test_stage_costs_equal_plain_loops(seed: int, overlap: float) -> None:
    profile = random_profile(seed, 9)
    link = LinkProfile(latency_us=1.5, bytes_per_us=90.0, overlap=overlap)
    K, M = 2 + seed % 3, 1 + seed % 6
    stage = chosen(profile, K, seed)
    graph = build_cost_graph(profile, link)
    stage_of = np.array([stage[graph.profile_names[members[0]]] for members in graph.members])
    costs = stage_costs(graph, stage_of, K)
    np.testing.assert_allclose(costs.load_us, loads_us(profile, stage, K, link), rtol=1e-12)
    memory = stage_memory(graph, MemoryModel(num_microbatches=M, shards=2), stage_of, K)
    np.testing.assert_allclose(memory.peak_bytes, peaks_bytes(profile, stage, K, M, shards=2), rtol=1e-12)
    assert simulated_step_us(costs, M) == pytest.approx(step_us(profile, stage, K, M, link), rel=1e-12)


def test_groups_are_one_node_and_so_are_the_cycles_they_make() -> None:
    profile = Profile(
        nodes=(node("a"), node("b", "a", group="v"), node("c", "b"), node("d", "c", group="v"), node("e", "d"))
    )
    graph = build_cost_graph(profile, LINK)
    assert [[graph.profile_names[i] for i in members] for members in graph.members] == [["a"], ["b", "c", "d"], ["e"]]
    assert graph.forward_us.tolist() == [1.0, 3.0, 1.0]


def test_nodes_are_numbered_in_topological_order_after_contraction() -> None:
    for seed in range(60):
        graph = build_cost_graph(random_profile(seed, 14, groups=True), LINK)
        assert all(u < v for v, before in enumerate(graph.predecessors) for u in before)
        assert sorted(i for members in graph.members for i in members) == list(range(14))


def test_a_tied_parameter_counts_once_on_a_stage_and_once_on_each_stage_that_reads_it() -> None:
    profile = Profile(
        nodes=(
            node("a", params=("w",), param_bytes=100),
            node("b", "a", params=("w",), param_bytes=100),
            node("c", "b", params=("w",), param_bytes=100),
        )
    )
    graph = build_cost_graph(profile, LINK)
    memory = stage_memory(graph, MemoryModel(num_microbatches=1), np.array([0, 0, 1]), 2)
    assert memory.param_bytes.tolist() == [100, 100]
    assert memory.optimizer_bytes.tolist() == [200, 200]


def test_without_a_table_the_bytes_of_a_node_are_split_over_its_names_and_are_trained() -> None:
    graph = build_cost_graph(Profile(nodes=(node("a", params=("w", "b"), param_bytes=100),)), LINK)
    assert dict(zip(graph.param_names, graph.param_bytes.tolist(), strict=True)) == {"w": 50.0, "b": 50.0}
    assert graph.trainable.all()


def test_the_residual_scales_the_times() -> None:
    graph = build_cost_graph(Profile(nodes=(node("a"), node("b", "a")), residual=1.5), LINK)
    assert graph.work_us.tolist() == [4.5, 4.5]


def test_gpipe_holds_every_micro_batch() -> None:
    memory = MemoryModel(num_microbatches=8, schedule="gpipe")
    assert [memory.in_flight(k, 3) for k in range(3)] == [8, 8, 8]
    assert [MemoryModel(num_microbatches=2).in_flight(k, 3) for k in range(3)] == [2, 2, 1]


def test_the_loading_of_data_is_no_compute() -> None:
    profile = Profile(
        nodes=(node("x", module="Input0"), node("y", "x", module="Input"), node("z", "y", module="Inputs"))
    )
    graph = build_cost_graph(profile, LINK)
    assert graph.work_us.tolist() == [0.0, 3.0, 3.0]  # the second reads something, and the third is a module
