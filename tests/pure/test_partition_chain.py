"""The interval DP against every split of the order, one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autopipe.cost import build_cost_graph
from autopipe.partition.effort import Effort
from autopipe.partition.graph.orders import relinearise, standard_orders
from autopipe.partition.memory.model import MemoryModel
from autopipe.partition.problem import Problem
from autopipe.partition.search.bottleneck import split_order
from profiler.records import LinkProfile
from scenarios.random_profiles import random_profile
from tests.pure.partition_reference import crossings, interval_assignments, loads_us, peaks_bytes


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("groups", [False, True])
def test_equals_brute_force_over_all_cuts_of_the_order(groups: bool, capped: bool) -> None:
    infeasible = 0
    for seed in range(75):
        profile = random_profile(1000 * groups + 500 * capped + seed, 7 + seed % 5, groups=groups)
        link = LinkProfile(latency_us=seed % 2 * 0.7, bytes_per_us=400.0, overlap=0.25 * (seed % 3))
        K, M = 2 + seed % 3, 1 + seed % 5
        graph = build_cost_graph(profile, link)
        if graph.num_nodes < K:
            continue
        orders = standard_orders(graph)
        order = orders[seed % len(orders)]
        named = [[graph.profile_names[i] for i in graph.members[v]] for v in order]
        every = list(interval_assignments(named, K))
        peaks = [max(peaks_bytes(profile, stage, K, M)) for stage in every]
        limit = float(np.quantile(peaks, 0.2 + 0.1 * (seed % 3))) - seed % 2 if capped else math.inf
        allowed = [stage for stage, peak in zip(every, peaks, strict=True) if peak <= limit]
        problem = Problem(graph=graph, num_stages=K, memory=MemoryModel(num_microbatches=M, limit_bytes=limit))
        found = split_order(problem, order, math.inf, Effort(1.0))
        if not allowed:
            infeasible += 1
            assert found is None
            continue
        best = min(max(loads_us(profile, stage, K, link)) for stage in allowed)
        assert found is not None
        assert found.load_us == pytest.approx(best, rel=1e-9)
        stage_of = found.stage_of[graph.node_of()]
        stage = {node.name: int(stage_of[i]) for i, node in enumerate(profile.nodes)}
        assert max(loads_us(profile, stage, K, link)) == pytest.approx(best, rel=1e-9)
        assert max(peaks_bytes(profile, stage, K, M)) <= limit
        assert traffic(profile, stage) == min(
            traffic(profile, s) for s in allowed if max(loads_us(profile, s, K, link)) <= best * (1 + 1e-9)
        )
    assert infeasible < 75


def traffic(profile, stage) -> int:
    size = {node.name: node.output_bytes * (1 + node.differentiable) for node in profile.nodes}
    return sum(size[name] for name, _, _ in crossings(profile, stage))


def test_every_order_is_topological() -> None:
    import random

    for seed in range(40):
        graph = build_cost_graph(random_profile(seed, 15, groups=True), LinkProfile(latency_us=0, bytes_per_us=1))
        n = graph.num_nodes
        stage_of = np.arange(n) * 3 // n
        orders = standard_orders(graph) + [relinearise(graph, stage_of, random.Random(seed), f) for f in range(4)]
        for order in orders:
            position = np.argsort(order)
            assert sorted(order.tolist()) == list(range(n))
            assert all(position[u] < position[v] for v, before in enumerate(graph.predecessors) for u in before)
        for order in orders[-4:]:
            assert (np.diff(stage_of[order]) >= 0).all()
