"""Recompute in the planner: the classes themselves, and the DP with them against every assignment."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from autopipe.cost import CostGraph, build_cost_graph
from autopipe.cost.graph import StageDevices
from autopipe.errors import PartitionError
from autopipe.partition import partition
from autopipe.partition.effort import Effort
from autopipe.partition.memory.model import MemoryModel, run_costs, stage_memory
from autopipe.partition.memory.recompute import with_recompute
from autopipe.partition.problem import Problem
from autopipe.partition.search.shortest_step import StepTimeCache
from profiler.records import LinkProfile, NodeProfile, Profile
from scenarios.random_profiles import random_profile

LINK = LinkProfile(latency_us=0.3, bytes_per_us=4000.0, overlap=0.5)


def block(i: int, before: str) -> list[NodeProfile]:
    """norm, a product, an activation and a product: the products keep their inputs, the others what they read."""

    def node(name: str, source: str, us: float, size: int, **values: object) -> NodeProfile:
        return NodeProfile(
            name=f"{name}{i}", inputs=(source,), forward_us=us, backward_us=2 * us, output_bytes=size, **values
        )

    return [
        node("norm", before, 100.0, 1000, saved_bytes=1000, keeps=(before,)),
        node("up", f"norm{i}", 3000.0, 4000, saved_bytes=4000, keeps=(f"norm{i}",)),
        node("act", f"up{i}", 300.0, 4000, saved_bytes=4000, keeps=(f"up{i}",)),
        node("down", f"act{i}", 3000.0, 1000, saved_bytes=1000, keeps=(f"act{i}",)),
    ]


def blocks(count: int) -> Profile:
    first = NodeProfile(name="x", inputs=(), forward_us=50.0, backward_us=50.0, output_bytes=1000, saved_bytes=1000)
    nodes = [dataclasses.replace(first, repeatable=False)]
    for i in range(count):
        nodes += block(i, nodes[-1].name)
    return Profile(nodes=tuple(nodes))


def test_the_first_class_drops_what_is_cheap_and_ends_with_what_keeps_only_inputs() -> None:
    profile = blocks(20)
    graph = with_recompute(build_cost_graph(profile, LINK), profile, "auto")
    none, *classes = graph.classes
    assert none.is_none
    cheap = next(c for c in classes if c.saved_bytes.sum() <= 20 * 1000 + 20 * 4000)
    # held: x, and the outputs of the products, which later ones read; dropped: those of norms and activations
    assert cheap.saved_bytes.sum() == 20 * 1000 + 20 * 4000
    names = [[graph.profile_names[i] for i in np.flatnonzero(cheap.region == r)] for r in range(4)]
    assert names == [["norm0", "up0"], ["act0", "down0"], ["norm1", "up1"], ["act1", "down1"]]
    assert cheap.recompute_us.sum() == pytest.approx(20 * (100 + 300) + 40 * 60.0)
    times = [c.recompute_us.sum() for c in graph.classes]
    assert times == sorted(times)


def test_groups_and_nodes_that_may_not_run_twice_stay_whole() -> None:
    profile = blocks(10)
    nodes = [
        dataclasses.replace(n, group=f"g{n.name[-1]}") if n.name.startswith(("norm", "act")) else n
        for n in profile.nodes
    ]
    nodes[6] = dataclasses.replace(nodes[6], repeatable=False)
    profile = dataclasses.replace(profile, nodes=tuple(nodes))
    graph = with_recompute(build_cost_graph(profile, LINK), profile, "auto")
    assert len(graph.classes) > 1
    for way in graph.classes:
        assert way.region[6] < 0
        for members in graph.members:
            assert len({int(way.region[i]) for i in members}) == 1 or not len(members) > 1
    whole = graph.classes[[c.at_once for c in graph.classes].index(True)]
    assert (whole.region >= 0).sum() == len(nodes) - 1 - len(graph.members[graph.node_of()[6]])


def every(graph: CostGraph, num_stages: int) -> list[np.ndarray]:
    n = graph.num_nodes
    stages = (np.array(s) for s in itertools.product(range(num_stages), repeat=n))
    return [
        s
        for s in stages
        if len(set(s.tolist())) == num_stages
        and all(s[u] <= s[v] for v, before in enumerate(graph.predecessors) for u in before)
    ]


@pytest.mark.parametrize("recompute", ["auto", "full"])
def test_the_dp_takes_the_best_assignment_with_its_recompute(recompute: str) -> None:
    again = 0
    for seed in range(16):
        profile, K, M = random_profile(seed, 7), 2 + seed % 2, 2 + seed % 4
        graph = with_recompute(build_cost_graph(profile, LINK), profile, recompute)
        memory = MemoryModel(num_microbatches=M)
        found = every(graph, K)
        free = [stage_memory(build_cost_graph(profile, LINK), memory, s, K).peak_bytes.max() for s in found]
        limit = float(np.quantile(free, 0.02)) * 0.97
        memory = dataclasses.replace(memory, limit_bytes=limit)
        fits = [s for s in found if stage_memory(graph, memory, s, K).peak_bytes.max() <= limit]
        arguments = {"num_stages": K, "num_microbatches": M, "link": LINK, "memory_limit": limit}
        if not fits:
            with pytest.raises(PartitionError, match="more than it has"):
                partition(profile, recompute=recompute, **arguments)
            continue
        best = min(float(run_costs(graph, memory, s, K).load_us.max()) for s in fits)
        plan = partition(profile, recompute=recompute, objective="bottleneck", **arguments)
        assert plan.bottleneck_us == pytest.approx(best, rel=1e-9), seed
        assert plan.bottleneck_bound_us <= best * (1 + 1e-9)
        assert max(s.peak_bytes for s in plan.stages) <= limit + 1
        again += any(s.recompute for s in plan.stages)
    assert again > 3


def test_a_device_twice_as_fast_computes_again_twice_as_fast() -> None:
    """With devices and links twice as fast the step is half as long, recompute included."""
    K, profile = 3, blocks(6)
    graph = with_recompute(build_cost_graph(profile, LINK), profile, "full")
    memory = MemoryModel(num_microbatches=6, limit_bytes=1e9)

    def step_us(speed: float) -> float:
        links = np.full((K, K), LINK.latency_us / speed), np.full((K, K), 1 / LINK.bytes_per_us / speed)
        devices = StageDevices(
            speed=np.full(K, speed),
            latency_us=links[0],
            us_per_byte=links[1],
            exposed=np.full((K, K), graph.exposed),
            reduce_latency_us=np.zeros(K),
            reduce_us_per_byte=np.zeros(K),
        )
        on_devices = dataclasses.replace(graph, devices=devices)
        stage_of = np.arange(graph.num_nodes) * K // graph.num_nodes
        assert stage_memory(on_devices, memory, stage_of, K).recompute_us.min() > 0
        return StepTimeCache(Problem(graph=on_devices, num_stages=K, memory=memory), Effort(1e9)).step_us(stage_of)

    assert step_us(2.0) == pytest.approx(step_us(1.0) / 2, rel=1e-9)
