"""The search for the shortest step: splits from several DPs, moved by descent, ranked by the simulator.

The least largest load is not the shortest step where micro-batches are few: the first and last stages then count more
than those between. So the splits with the least load are only starts. From each come splits with less traffic at a
slightly larger load (Alpa's sweep over t_max, OSDI 2022), and the split with the least critical path H of the same
order (steps_dp.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import pairwise
from random import Random

import numpy as np

from autopipe.cost import IntArray, stage_costs
from autopipe.partition.dp.grids import grid
from autopipe.partition.dp.interval_dp import least_traffic, stage_blocks
from autopipe.partition.dp.intervals import IntervalCosts
from autopipe.partition.dp.step_interval_dp import least_step_cuts
from autopipe.partition.effort import Effort
from autopipe.partition.graph.orders import depth_first, relinearise
from autopipe.partition.memory.model import run_costs, stage_memory, with_recompute
from autopipe.partition.problem import Problem, Solution
from autopipe.partition.search.annealing import FROM_BEST, annealed, can_anneal, step_peak
from autopipe.partition.search.bottleneck import kick
from autopipe.partition.search.exhaustive import shortest_of_all
from autopipe.partition.search.local_moves import polish
from autopipe.partition.timing import ranked_step_us

SLACKS = (0.002, 0.01, 0.03, 0.1, 0.3)
"""Factors by which the slowest stage may be slower than the best found, in exchange for less traffic."""
LARGE, LARGE_GRID = 1200, 400
"""Nodes from which the DPs run on a grid, and its size."""
STARTS_MOVED, STALL = 8, 24
"""Splits from which descent starts, and orders in a row without a shorter step after which the search ends."""
TINY, STALL_TINY, ANYWHERE = 32, 80, 20
"""Nodes up to which random starts are worth their time, the orders in a row then, and how many are drawn for one that
fits."""
ACTION_S, ASSIGNMENT_S, NODE_S = 1e-6, 4e-4, 4e-7
"""Seconds that the simulator takes for an action, and that costing an assignment takes, and for each node of it."""


class StepTimeCache:
    """Simulated step times of assignments, each simulated once."""

    def __init__(self, problem: Problem, effort: Effort) -> None:
        self.problem, self.effort = problem, effort
        self._known: dict[bytes, float] = {}

    def step_us(self, stage_of: IntArray) -> float:
        """The simulated step; infinite where a stage does not fit into memory or the rules are broken."""
        key = stage_of.tobytes()
        if key not in self._known:
            self._known[key] = self._simulate(stage_of)
        return self._known[key]

    def _simulate(self, stage_of: IntArray) -> float:
        problem, memory = self.problem, self.problem.memory
        actions = 2 * problem.num_stages * memory.num_microbatches
        choices = len(problem.graph.classes)  # each is costed where memory decides
        self.effort.spend(seconds=ASSIGNMENT_S + ACTION_S * actions + choices * NODE_S * problem.graph.num_nodes)
        if problem.rules.broken(stage_of, problem.num_stages):
            return np.inf
        costs = stage_costs(problem.graph, stage_of, problem.num_stages)
        if memory.constrains(problem.graph):
            held = stage_memory(problem.graph, memory, stage_of, problem.num_stages)
            if not memory.fits(held.peak_bytes):
                return np.inf
            costs = with_recompute(costs, held, problem.graph)
        return ranked_step_us(costs, memory.num_microbatches, memory.schedule)


def shortest_step(
    problem: Problem, starts: Iterable[Solution], random: Random, effort: Effort
) -> tuple[IntArray, float]:
    """The assignment with the shortest simulated step, and what no assignment can beat, 0 where nothing is known.

    A small graph is searched whole. Otherwise: the starts, their neighbours, and descent from the best of them.
    """
    clock = StepTimeCache(problem, effort)
    unique = list({s.stage_of.tobytes(): s for s in starts}.values())
    unique.sort(key=lambda s: clock.step_us(s.stage_of))
    least = clock.step_us(unique[0].stage_of)
    of_all = shortest_of_all(problem, least, effort)
    if of_all is not None:
        least, better = of_all
        return (unique[0].stage_of if better is None else better), least
    part = effort.share(0.4)
    budget, found = part.left_s, list(unique)
    for start in unique:
        if part.spent:
            break
        found += _neighbours(problem, clock, start, part)
    effort.spend(seconds=budget - part.left_s)
    if can_anneal(problem):
        best_so_far = min(found, key=lambda s: clock.step_us(s.stage_of)).stage_of
        part = effort.share(0.7)
        budget = part.left_s
        found.append(annealed(problem, best_so_far, FROM_BEST, step_peak(problem), random, part))
        effort.spend(seconds=budget - part.left_s)
    found.sort(key=lambda s: clock.step_us(s.stage_of))
    best = found[0].stage_of
    for solution in _distinct(found)[:STARTS_MOVED]:
        best = min(best, _moved(problem, clock, solution, effort), key=clock.step_us)
    return _relinearised(problem, clock, best, random, effort), 0.0


def _moved(problem: Problem, clock: StepTimeCache, start: Solution, effort: Effort) -> IntArray:
    stage_of = descend(problem, clock, start, effort)
    return polish(problem.graph, stage_of, problem.num_stages, clock.step_us, effort)


def _relinearised(problem: Problem, clock: StepTimeCache, best: IntArray, random: Random, effort: Effort) -> IntArray:
    """The same from other orders of the best stages, kicked every other time, until `STALL` in a row bring nothing."""
    idle, stall = 0, STALL_TINY if problem.graph.num_nodes <= TINY else STALL
    while idle < stall and not effort.spent:
        order = relinearise(problem.graph, best, random, idle)
        start = Solution(load_us=np.inf, stage_of=best, order=order)
        near = kick(problem, start, random, effort) if idle % 2 else start
        if idle % 3 == 2 and problem.graph.num_nodes <= TINY:
            tries = (_anywhere(problem, random) for _ in range(ANYWHERE))
            near = next((s for s in tries if np.isfinite(clock.step_us(s.stage_of))), near)
        found = min(
            [near, *_neighbours(problem, clock, dataclasses.replace(near, load_us=np.inf), effort)],
            key=lambda s: clock.step_us(s.stage_of),
        )
        moved = min(
            (_moved(problem, clock, s, effort) for s in {id(s): s for s in (near, found)}.values()), key=clock.step_us
        )
        idle += 1
        if clock.step_us(moved) < clock.step_us(best) * (1 - 1e-6):
            best, idle = moved, 0
    return best


def _anywhere(problem: Problem, random: Random) -> Solution:
    """Random cuts of a random order."""
    graph, n, K = problem.graph, problem.graph.num_nodes, problem.num_stages
    order = np.array(depth_first(graph.successors, graph.predecessors, random=random), np.int64)
    bounds = [0, *sorted(random.sample(range(1, n), K - 1)), n]
    stage_of = np.empty(n, np.int64)
    stage_of[order] = np.repeat(np.arange(K), np.diff(bounds))
    return Solution(load_us=np.inf, stage_of=stage_of, order=order)


def _distinct(solutions: list[Solution]) -> list[Solution]:
    """Solutions with different assignments, in the same order."""
    return list({s.stage_of.tobytes(): s for s in reversed(solutions)}.values())[::-1]


def _neighbours(problem: Problem, clock: StepTimeCache, start: Solution, effort: Effort) -> list[Solution]:
    """Splits of the same order with less traffic, and with the least critical path."""
    graph, positions = problem.graph, None
    if graph.num_nodes >= LARGE:
        cuts = np.cumsum(np.bincount(start.stage_of, minlength=problem.num_stages))[:-1]
        positions = grid(graph, start.order, max(LARGE_GRID, 8 * problem.num_stages), around=cuts)
    costs = IntervalCosts(graph, start.order, problem.memory, positions, problem.rules)
    found = [] if np.isinf(start.load_us) else _with_less_traffic(problem, costs, start, effort)
    return found + _with_shorter_path(problem, clock, costs, start, effort)


def _with_less_traffic(problem: Problem, costs: IntervalCosts, start: Solution, effort: Effort) -> list[Solution]:
    """Splits whose slowest stage is a little slower, with the least traffic at that load."""
    blocks = stage_blocks(costs, problem.num_stages, start.load_us * (1 + SLACKS[-1]), effort)
    found = []
    for slack in SLACKS:
        split = None if blocks is None else least_traffic(costs, blocks, start.load_us * (1 + slack))
        effort.spend(cells=sum(block.load_us.size for block in blocks or []))
        if split is not None:
            stage_of = costs.stages(split.cuts)
            found.append(Solution(load_us=split.load_us, stage_of=stage_of, order=start.order))
    return found


def _with_shorter_path(
    problem: Problem, clock: StepTimeCache, costs: IntervalCosts, start: Solution, effort: Effort
) -> list[Solution]:
    """Splits with the least H, the estimate of the round trip taken from the split before, while the step gets
    shorter."""
    K, M = problem.num_stages, problem.memory.num_microbatches
    found: list[Solution] = []
    stage_of, step = start.stage_of, clock.step_us(start.stage_of)
    for _ in range(3):
        if not np.isfinite(step) or effort.spent:
            break
        stages = run_costs(problem.graph, problem.memory, stage_of, K)
        links = sum(there + (back or 0.0) for there, back in stages.links().values())
        cuts = least_step_cuts(costs, K, M, step * 1.05, float(stages.load_us.sum()) + links, effort)
        if cuts is None:
            break
        stage_of = costs.stages(cuts)
        found.append(Solution(load_us=np.inf, stage_of=stage_of, order=start.order))
        if clock.step_us(stage_of) >= step * (1 - 1e-9):
            break
        step = clock.step_us(stage_of)
    return found


def descend(problem: Problem, clock: StepTimeCache, start: Solution, effort: Effort) -> IntArray:
    """Moves one cut of the order at a time, by ever smaller distances, while the simulated step gets shorter."""
    K, n = problem.num_stages, problem.graph.num_nodes
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
                candidate[start.order] = np.repeat(np.arange(K), np.diff(trial))
                if clock.step_us(candidate) < clock.step_us(stage_of) * (1 - 1e-9):
                    bounds, stage_of, moved = trial, candidate, True
        if not moved:
            distance //= 2
    return stage_of
