"""The search of a whole small graph against the costs of one assignment after another."""

from __future__ import annotations

import numpy as np
import pytest

from autopipe.cost import CostGraph, IntArray, build_cost_graph
from autopipe.partition import partition
from autopipe.partition.constraints import Rules
from autopipe.partition.effort import Effort
from autopipe.partition.memory.model import MemoryModel, stage_memory
from autopipe.partition.memory.recompute import with_recompute
from autopipe.partition.problem import Problem
from autopipe.partition.search.exhaustive import shortest_of_all
from autopipe.partition.search.shortest_step import StepTimeCache
from profiler.records import LinkProfile
from scenarios.random_profiles import random_profile


def every_assignment(graph: CostGraph, num_stages: int) -> list[IntArray]:
    """All monotone assignments without empty stages."""
    found: list[list[int]] = [[]]
    for before in graph.predecessors:
        found = [[*s, k] for s in found for k in range(max((s[u] for u in before), default=0), num_stages)]
    return [np.array(s) for s in found if len(set(s)) == num_stages]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("seed", range(16))
def test_nothing_is_shorter_than_what_is_found(seed: int, schedule: str) -> None:
    """Under a limit with recompute, under rules, and with neither."""
    K, M = 2 + seed % 3, 1 + seed % 7
    profile = random_profile(seed, 8, chain=seed % 3 == 0)
    link = LinkProfile(latency_us=0.4, bytes_per_us=500.0, overlap=0.5 * (seed % 3))
    graph, memory = build_cost_graph(profile, link), MemoryModel(num_microbatches=M, schedule=schedule)
    every, rules = every_assignment(graph, K), Rules()
    if seed % 2:
        peaks = [float(stage_memory(graph, memory, s, K).peak_bytes.max()) for s in every]
        graph = with_recompute(graph, profile, "auto")
        memory = MemoryModel(num_microbatches=M, schedule=schedule, limit_bytes=float(np.quantile(peaks, 0.2)))
    elif seed % 4:
        rules = Rules(first=np.array([0]), alone=np.array([7]))
    problem = Problem(graph=graph, num_stages=K, memory=memory, rules=rules)
    clock = StepTimeCache(problem, Effort(1e9))
    best = min(clock.step_us(s) for s in every)
    found = shortest_of_all(problem, np.inf, Effort(1e9))
    assert found is not None
    assert found[0] == pytest.approx(best, rel=1e-9)
    if np.isfinite(best):
        assert found[1] is not None
        assert clock.step_us(found[1]) == pytest.approx(best, rel=1e-9)
        below = shortest_of_all(problem, best * (1 - 1e-6), Effort(1e9))
        assert below is not None
        assert below[1] is None, "nothing is below the best"


def test_the_step_of_a_small_graph_is_proved() -> None:
    profile = random_profile(3, 12)
    link = LinkProfile(latency_us=0.4, bytes_per_us=500.0, overlap=0.0)
    plan = partition(profile, num_stages=3, num_microbatches=5, link=link)
    assert plan.proved
    assert plan.lower_bound_us == pytest.approx(plan.step_us, rel=1e-4)


def test_too_many_assignments_are_left_to_the_search() -> None:
    graph = build_cost_graph(random_profile(1, 60), LinkProfile(latency_us=0.0, bytes_per_us=500.0))
    problem = Problem(graph=graph, num_stages=4, memory=MemoryModel(num_microbatches=1))
    assert shortest_of_all(problem, np.inf, Effort(10.0)) is None
