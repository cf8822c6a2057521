"""Annealing keeps its account of loads and moves right, and the planner the better for it."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from autopipe.cost import build_cost_graph, stage_costs
from autopipe.partition import partition
from autopipe.partition.baselines import equal_time
from autopipe.partition.effort import Effort
from autopipe.partition.memory.model import MemoryModel
from autopipe.partition.problem import Problem
from autopipe.partition.search.annealing import FROM_ANYWHERE, FROM_BEST, Cooling, Walk, annealed, step_peak
from autopipe.simulate import h_bound_us
from profiler.records import LinkProfile
from scenarios.random_profiles import random_profile

LINK = LinkProfile(latency_us=0.0, bytes_per_us=400.0, overlap=0.0)


@pytest.mark.parametrize("cooling", [FROM_ANYWHERE, FROM_BEST])
@pytest.mark.parametrize("seed", range(6))
def test_the_loads_after_many_moves_are_those_of_the_assignment(seed: int, cooling: Cooling) -> None:
    graph, K = build_cost_graph(random_profile(seed, 40), LINK), 2 + seed % 4
    walk = Walk(graph, equal_time(graph, K), K)
    found = walk.cool(cooling, max, 20_000, Random(seed))
    for stage_of in (np.array(walk.stage), found):
        assert sorted(set(stage_of.tolist())) == list(range(K))
        assert all(stage_of[u] <= stage_of[v] for v, before in enumerate(graph.predecessors) for u in before)
    assert walk.load == pytest.approx(stage_costs(graph, np.array(walk.stage), K).load_us.tolist())
    start = stage_costs(graph, equal_time(graph, K), K).load_us.max()
    assert stage_costs(graph, found, K).load_us.max() <= start * (1 + 1e-9)


def test_the_same_seed_anneals_the_same_split_and_the_effort_bounds_it() -> None:
    graph = build_cost_graph(random_profile(5, 60), LINK)
    problem = Problem(graph=graph, num_stages=4, memory=MemoryModel(num_microbatches=8))
    start, effort = equal_time(graph, 4), Effort(0.05)
    one, other = (annealed(problem, start, FROM_ANYWHERE, max, Random(7), Effort(0.05)) for _ in range(2))
    assert (one.stage_of == other.stage_of).all()
    annealed(problem, start, FROM_ANYWHERE, max, Random(7), effort)
    assert effort.spent
    assert one.load_us == pytest.approx(stage_costs(graph, one.stage_of, 4).load_us.max())


@pytest.mark.parametrize("num_microbatches", [1, 3, 8])
def test_the_peak_of_a_line_is_the_bound_on_its_step(num_microbatches: int) -> None:
    """H without its last term, for stages whose forward takes a third of the time."""
    graph = build_cost_graph(random_profile(2, 30), LINK)
    problem = Problem(graph=graph, num_stages=4, memory=MemoryModel(num_microbatches=num_microbatches))
    share = float(graph.forward_us.sum() / graph.work_us.sum())
    load = [3.0, 5.0, 2.0, 4.0]
    links = {(k, k + 1): (0.0, 0.0) for k in range(3)}
    bound = h_bound_us([share * t for t in load], [(1 - share) * t for t in load], links, num_microbatches)
    estimate = step_peak(problem)(load) * num_microbatches
    assert 0.8 * bound <= estimate <= bound * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_is_slower_than_the_one_with_the_least_largest_load(seed: int) -> None:
    profile, K = random_profile(seed, 150), 3 + seed
    for num_microbatches in (K, 4 * K):
        common = {"num_stages": K, "num_microbatches": num_microbatches, "link": LINK, "time_budget_s": 0.3}
        least = partition(profile, objective="bottleneck", **common)
        plan = partition(profile, objective="step", **common)
        assert plan.step_us <= least.step_us * (1 + 1e-9)
