"""The search for the shortest step: splits collected at several loads, moved by descent, ranked by the simulator."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from autopipe.cost import IntArray
from autopipe.partition.bottleneck import Problem, Solution
from autopipe.partition.chain import least_traffic, stage_blocks
from autopipe.partition.effort import Effort
from autopipe.partition.intervals import IntervalCosts
from autopipe.partition.memory import stage_memory
from autopipe.partition.timing import step_us

SLACKS = (0.002, 0.01, 0.03, 0.1, 0.3)
"""How much slower than the fastest stage found the slowest may be, in exchange for less traffic."""
SIMULATION_S = 3e-6
"""Seconds that the simulator takes for each action, and `ASSIGNMENT_S` for costing an assignment."""
ASSIGNMENT_S = 3e-4


class Clock:
    """Simulated step times of assignments, each simulated once."""

    def __init__(self, problem: Problem, effort: Effort) -> None:
        self.problem, self.effort = problem, effort
        self._known: dict[bytes, float] = {}

    def step_us(self, stage_of: IntArray) -> float:
        """The simulated step; infinite where a stage does not fit into memory."""
        key = stage_of.tobytes()
        if key not in self._known:
            self._known[key] = self._simulate(stage_of)
        return self._known[key]

    def _simulate(self, stage_of: IntArray) -> float:
        problem, memory = self.problem, self.problem.memory
        actions = 2 * problem.num_stages * memory.num_microbatches
        self.effort.spend(seconds=ASSIGNMENT_S + SIMULATION_S * actions)
        if np.isfinite(memory.limit_bytes):
            peak = stage_memory(problem.graph, memory, stage_of, problem.num_stages).peak_bytes
            if peak.max() > memory.limit_bytes:
                return np.inf
        return step_us(problem.graph, stage_of, problem.num_stages, memory.num_microbatches, memory.schedule)


def shortest_step(problem: Problem, starts: Iterable[Solution], effort: Effort) -> IntArray:
    """The assignment with the shortest simulated step: the starts, their cheaper neighbours, and descent from the best."""
    clock = Clock(problem, effort)
    solutions = [s for start in starts for s in (start, *_with_less_traffic(problem, start, effort))]
    solutions = list({s.stage_of.tobytes(): s for s in solutions}.values())
    solutions.sort(key=lambda s: clock.step_us(s.stage_of))
    best = solutions[0].stage_of
    for solution in solutions[:2]:
        moved = descend(problem, clock, solution, effort)
        best = min(best, moved, key=clock.step_us)
    return best


def _with_less_traffic(problem: Problem, start: Solution, effort: Effort) -> list[Solution]:
    """Splits of the same order whose slowest stage is a little slower, with the least traffic at that load."""
    if np.isinf(start.load_us):
        return []
    costs = IntervalCosts(problem.graph, start.order, problem.memory)
    blocks = stage_blocks(costs, problem.num_stages, start.load_us * (1 + SLACKS[-1]), effort)
    found = []
    for slack in SLACKS:
        split = None if blocks is None else least_traffic(costs, blocks, start.load_us * (1 + slack))
        if split is not None:
            stage_of = costs.stages(split.cuts)
            found.append(Solution(load_us=split.load_us, stage_of=stage_of, order=start.order))
    return found


def descend(problem: Problem, clock: Clock, start: Solution, effort: Effort) -> IntArray:
    """Moves one cut of the order at a time, by ever smaller distances, while the simulated step gets shorter."""
    K, n = problem.num_stages, problem.graph.num_nodes
    order = start.order
    bounds = [0, *np.cumsum(np.bincount(start.stage_of, minlength=K)).tolist()]
    stage_of = start.stage_of
    distance = max(n // 8, 1)
    while distance and not effort.spent:
        moved = False
        for k in range(1, K):
            for step in (-distance, distance):
                trial = [*bounds[:k], bounds[k] + step, *bounds[k + 1 :]]
                if not all(i < j for i, j in pairwise(trial)):
                    continue
                candidate = np.empty(n, np.int64)
                candidate[order] = np.repeat(np.arange(K), np.diff(trial))
                if clock.step_us(candidate) < clock.step_us(stage_of) * (1 - 1e-9):
                    bounds, stage_of, moved = trial, candidate, True
        if not moved:
            distance //= 2
    return stage_of
