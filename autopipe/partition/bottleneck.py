"""The search for the least largest load over several orders of the graph.

One interval DP (chain.py) is exact for its order. The search takes the standard orders, then keeps re-linearising: an order
in which the stages found are still intervals, shuffled inside them, holds the split found and about n^K others, so the next
DP is at least as good. Further starts, from random depth-first orders, leave local optima. Large graphs are cut on a grid:
coarse over the whole order, then fine around the cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from autopipe.cost import CostGraph, IntArray
from autopipe.partition.bounds import load_bound_us
from autopipe.partition.chain import TOLERANCE, best_split
from autopipe.partition.effort import Effort
from autopipe.partition.grids import grid
from autopipe.partition.intervals import IntervalCosts
from autopipe.partition.memory import MemoryModel
from autopipe.partition.orders import depth_first, relinearise, standard_orders

GRID_POSITIONS = 1200
FIRST_GRID = 400
BANDS = (0.6, 0.15, 0.03)
"""Widths of the fine grids around the cuts, as shares of the mean work of a stage."""
CLOSE_ENOUGH = 1e-4
"""A load this close to the bound, relatively, is not worth more search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """An assignment of nodes to stages, its largest load, and an order of which its stages are intervals."""

    load_us: float
    stage_of: IntArray
    order: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is to be split: a graph into K stages, each within the memory of its device."""

    graph: CostGraph
    num_stages: int
    memory: MemoryModel

    def cuts(self, solution: Solution) -> IntArray:
        """Positions of the K - 1 cuts in the solution's order."""
        return np.cumsum(np.bincount(solution.stage_of, minlength=self.num_stages))[:-1]

    @property
    def positions(self) -> int:
        """The most positions of a grid: all of a graph of ordinary size."""
        return max(GRID_POSITIONS, 8 * self.num_stages)


def split_order(
    problem: Problem, order: IntArray, upper_us: float, effort: Effort, positions: IntArray | None = None
) -> Solution | None:
    """The best split of one order, at these positions, whose largest load is at most `upper_us`."""
    costs = IntervalCosts(problem.graph, order, problem.memory, positions)
    effort.spend(cells=20 * problem.graph.num_nodes + 1e4)
    split = best_split(costs, problem.num_stages, upper_us, effort)
    if split is None:
        return None
    return Solution(load_us=split.load_us, stage_of=costs.stages(split.cuts), order=order)


def first_splits(problem: Problem, effort: Effort) -> list[Solution]:
    """The best split of each standard order, the best of all first; empty where no order holds one that fits."""
    found: list[Solution] = []
    for order in standard_orders(problem.graph):
        effort.spend(cells=60 * problem.graph.num_nodes)
        upper = min((s.load_us for s in found), default=np.inf)
        solution = split_coarse_to_fine(problem, order, upper, effort)
        if solution is not None:
            found.append(solution)
    return sorted(found, key=lambda s: s.load_us)


def split_coarse_to_fine(problem: Problem, order: IntArray, upper_us: float, effort: Effort) -> Solution | None:
    """The best split of an order: exact on a graph of ordinary size, else on a coarse grid and then around its cuts."""
    if problem.graph.num_nodes < problem.positions:
        return _widening(problem, order, upper_us, effort, None)
    coarse = grid(problem.graph, order, max(FIRST_GRID, 4 * problem.num_stages))
    best = _widening(problem, order, upper_us * 1.5, effort, coarse)
    if best is None:
        return None
    mean = float(problem.graph.work_us.sum()) / problem.num_stages
    for band in BANDS:
        positions = grid(problem.graph, order, problem.positions, around=problem.cuts(best), band_us=band * mean)
        best = split_order(problem, order, best.load_us, effort, positions) or best
    return best


def _widening(
    problem: Problem, order: IntArray, upper_us: float, effort: Effort, positions: IntArray | None
) -> Solution | None:
    """Small upper bounds first: they leave few states, and the first one that holds a split holds the best."""
    bound, slack = load_bound_us(problem.graph, problem.num_stages), 0.02
    while bound * (1 + slack) < upper_us and slack < 1e4:
        solution = split_order(problem, order, bound * (1 + slack), effort, positions)
        if solution is not None:
            return solution
        slack *= 2.5
    return split_order(problem, order, upper_us, effort, positions)


def improve(problem: Problem, best: Solution, random: Random, effort: Effort, goal_us: float, stall: int) -> Solution:
    """Re-linearises until `stall` orders in a row bring nothing, the goal is met, or the effort is spent."""
    graph = problem.graph
    mean = float(graph.work_us.sum()) / problem.num_stages
    idle = turn = 0
    while idle < stall and not effort.spent and best.load_us > goal_us:
        order = relinearise(graph, best.stage_of, random, turn)
        effort.spend(cells=40 * graph.num_nodes)
        positions = None
        if graph.num_nodes >= problem.positions:
            band = BANDS[turn % len(BANDS)] * mean
            positions = grid(graph, order, problem.positions, around=problem.cuts(best), band_us=band)
        turn += 1
        found = split_order(problem, order, best.load_us * (1 + TOLERANCE), effort, positions)
        idle += 1
        if found is not None and found.load_us <= best.load_us * (1 + TOLERANCE):
            if found.load_us < best.load_us * (1 - 1e-5):
                idle = 0
            best = found
    return best


def search(
    problem: Problem, starts: list[Solution], random: Random, effort: Effort, stall: int, rounds: int
) -> Solution:
    """The best of several descents: from the best standard order, then from random orders and from the best again in turn."""
    graph = problem.graph
    goal = load_bound_us(graph, problem.num_stages) * (1 + CLOSE_ENOUGH)
    best = improve(problem, starts[0], random, effort, goal, stall)
    for turn in range(rounds):
        if effort.spent or best.load_us <= goal:
            break
        start: Solution | None = best
        if turn % 3 < 2:
            ahead, back = graph.successors, graph.predecessors
            forward = depth_first(ahead, back, random=random) if turn % 3 == 0 else None
            order = forward or depth_first(back, ahead, random=random)[::-1]
            start = split_coarse_to_fine(problem, np.array(order, np.int64), best.load_us * 1.5, effort)
        if start is not None:
            found = improve(problem, start, random, effort, goal, stall)
            best = min(best, found, key=lambda s: s.load_us)
    return best
