"""The parts of the planner on their own: lossless reduction, the down-set DP and its proof, the skips left out in
ranking."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from autopipe.cost import CostGraph, build_cost_graph, stage_costs
from autopipe.partition import partition
from autopipe.partition.bounds import load_bound_us
from autopipe.partition.dp.chain_bound import fluid_bound_us
from autopipe.partition.dp.downset_dp import refine
from autopipe.partition.effort import Effort
from autopipe.partition.graph.downsets import Lattice
from autopipe.partition.graph.reduce import reduced
from autopipe.partition.memory.model import MemoryModel
from autopipe.partition.problem import Problem
from autopipe.partition.search.bottleneck import first_splits
from autopipe.partition.timing import ranked_step_us, simulated_step_us
from profiler.records import LinkProfile, NodeProfile, Profile
from scenarios.random_profiles import random_profile


def idle_profile(seed: int, num_nodes: int) -> Profile:
    """A random graph in which more than half of the nodes take no time."""
    profile, rng = random_profile(seed, num_nodes), random.Random(seed)
    nodes = [
        dataclasses.replace(n, forward_us=0.0, backward_us=0.0) if rng.random() < 0.6 else n for n in profile.nodes
    ]
    return dataclasses.replace(profile, nodes=tuple(nodes))


def least_load(graph: CostGraph, num_stages: int) -> float:
    """The least largest load of all monotone assignments, empty stages allowed."""
    stage, best = [0] * graph.num_nodes, np.inf

    def extend(v: int) -> None:
        nonlocal best
        if v == graph.num_nodes:
            best = min(best, float(stage_costs(graph, np.array(stage), num_stages).load_us.max()))
            return
        for k in range(max((stage[u] for u in graph.predecessors[v]), default=0), num_stages):
            stage[v] = k
            extend(v + 1)

    extend(0)
    return best


def test_reduction_keeps_the_least_load() -> None:
    merged = 0
    for seed in range(80):
        link = LinkProfile(latency_us=seed % 2 * 0.5, bytes_per_us=200.0, overlap=0.0)
        graph = build_cost_graph(idle_profile(seed, 8), link)
        small, index = reduced(graph, limited=False)
        merged += small.num_nodes < graph.num_nodes
        assert all(u < v for v, before in enumerate(small.predecessors) for u in before)
        assert small.work_us.sum() == pytest.approx(graph.work_us.sum())
        assert all(index[u] <= index[v] for v, before in enumerate(graph.predecessors) for u in before)
        for num_stages in (2, 3):
            assert least_load(small, num_stages) == pytest.approx(least_load(graph, num_stages), rel=1e-12), seed
    assert merged > 30


def test_a_dry_window_holds_every_down_set() -> None:
    for seed in range(60):
        graph = build_cost_graph(random_profile(seed, 10), LinkProfile(latency_us=0.0, bytes_per_us=100.0))
        total = float(graph.work_us.sum())
        low, high = 0.3 * total, 0.6 * total
        every = [
            members
            for mask in range(1 << 10)
            for members in [[v for v in range(10) if mask >> v & 1]]
            if all(mask >> u & 1 for v in members for u in graph.predecessors[v])
            and low <= graph.work_us[members].sum() <= high
        ]
        start = np.zeros((1, 10), bool)
        for v in range(10):
            if graph.work_us[start[0]].sum() < low:
                start[0, v] = True
        pool = Lattice(graph).window(start, low, high, 2000, 0.0, random.Random(0), local=False)
        found = sorted(np.flatnonzero(pool.whole(i)).tolist() for i in range(len(pool.work)))
        assert pool.complete, seed
        assert found == sorted(every)


def test_what_is_proved_is_the_optimum() -> None:
    proved = 0
    for seed in range(60):
        graph = build_cost_graph(random_profile(seed, 9), LinkProfile(latency_us=0.3, bytes_per_us=300.0, overlap=0.0))
        problem = Problem(graph=graph, num_stages=3, memory=MemoryModel(num_microbatches=4))
        start = first_splits(problem, Effort(1.0))[0]
        found = refine(problem, start, random.Random(0), Effort(2.0), 0.0, merged=True)
        optimum = least_load(graph, 3)
        assert found.bound_us <= optimum * (1 + 1e-9)
        assert found.solution.load_us >= optimum * (1 - 1e-9)
        if found.bound_us >= found.solution.load_us * (1 - 1e-9):
            proved += 1
            assert found.solution.load_us == pytest.approx(optimum, rel=1e-9)
    assert proved > 40


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_skips_left_out_in_ranking_delay_nothing(overlap: float) -> None:
    for seed in range(80):
        graph = build_cost_graph(
            random_profile(seed, 16), LinkProfile(latency_us=0.5, bytes_per_us=300.0, overlap=overlap)
        )
        num_stages, num_microbatches = 3 + seed % 3, 1 + seed % 9
        stage_of = np.arange(16) * num_stages // 16
        costs = stage_costs(graph, stage_of, num_stages)
        assert ranked_step_us(costs, num_microbatches, "1f1b") == pytest.approx(
            simulated_step_us(costs, num_microbatches), rel=1e-9
        ), seed


def test_the_bound_of_a_line_with_little_beside_it_is_never_above_the_optimum() -> None:
    better = 0
    for seed in range(60):
        profile, rng = random_profile(seed, 8, chain=True), random.Random(seed)
        skips = [rng.randrange(3, 8) for _ in range(2)]
        nodes = [
            dataclasses.replace(n, forward_us=n.forward_us + 1, inputs=tuple(sorted({*n.inputs, f"n{v - 3}"})))
            if v in skips
            else dataclasses.replace(n, forward_us=n.forward_us + 1)
            for v, n in enumerate(profile.nodes)
        ]
        side = dataclasses.replace(nodes[2], name="side", inputs=("n0",), forward_us=0.3, backward_us=0.2)
        nodes[6] = dataclasses.replace(nodes[6], inputs=(*nodes[6].inputs, "side"))
        graph = build_cost_graph(
            dataclasses.replace(profile, nodes=(*nodes[:3], side, *nodes[3:])),
            LinkProfile(latency_us=0.3, bytes_per_us=900.0, overlap=0.0),
        )
        for num_stages in (2, 3):
            optimum, mean = least_load(graph, num_stages), load_bound_us(graph, num_stages)
            bound = fluid_bound_us(graph, num_stages, mean, optimum * 1.2, Effort(5.0))
            assert mean <= bound <= optimum * (1 + 1e-9), seed
            better += bound > mean * 1.001
    assert better > 30


def test_a_stage_of_nodes_without_work_may_make_a_step_shorter() -> None:
    """Reduction hides such stages; the usual splits of the whole graph have them, and no plan is slower than these.

    Twelve layers and a head as heavy as three of them: the labels alone are a stage that shortens the pipeline by one
    message.
    """
    nodes: list[tuple[str, float, tuple[str, ...]]] = [
        (f"n{i}", 1.0 if i % 2 else 0.0, (f"n{i - 1}",) if i else ()) for i in range(24)
    ]
    nodes += [("labels", 0.0, ()), ("head", 3.0, ("n23",)), ("loss", 0.2, ("head", "labels"))]
    profile = Profile(
        nodes=tuple(
            NodeProfile(name=name, inputs=inputs, forward_us=us, backward_us=us, output_bytes=100 if us else 1)
            for name, us, inputs in nodes
        )
    )
    link = LinkProfile(latency_us=0.3, bytes_per_us=1e3, overlap=1.0)
    for num_stages in range(3, 9):
        plan = partition(profile, num_stages=num_stages, link=link)
        assert plan.step_us <= min(b.step_us for b in plan.baselines) * (1 + 1e-9), num_stages
