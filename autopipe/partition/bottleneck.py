"""The search for the least largest load over several orders of the graph, and the splits that the search collects.

One interval DP (chain.py) is exact for its order. The search takes the standard orders, then keeps re-linearising: an order
in which the stages found are still intervals, shuffled inside them, holds the split found and about n^K others, so the next
DP is at least as good. Large graphs are cut on a grid: coarse over the whole order, then fine around the cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from autopipe.cost import CostGraph, IntArray
from autopipe.partition.bounds import load_bound_us
from autopipe.partition.chain import TOLERANCE, Split, best_split
from autopipe.partition.effort import Effort
from autopipe.partition.intervals import IntervalCosts
from autopipe.partition.memory import MemoryModel
from autopipe.partition.orders import relinearise, standard_orders

GRID_POSITIONS = 1200
STALL = 40
CLOSE_ENOUGH = 1e-4


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


def split_order(problem: Problem, order: IntArray, upper_us: float, effort: Effort) -> Solution | None:
    """The best split of one order whose largest load is at most `upper_us`."""
    costs = IntervalCosts(problem.graph, order, problem.memory)
    return best_on(costs, problem.num_stages, upper_us, effort)


def best_on(costs: IntervalCosts, num_stages: int, upper_us: float, effort: Effort) -> Solution | None:
    """The best split on the grid of an order."""
    effort.spend(cells=costs.num_positions * 30 + 1e4)
    split = best_split(costs, num_stages, upper_us, effort)
    if split is None:
        return None
    return Solution(load_us=split.load_us, stage_of=costs.stages(split.cuts), order=costs.order)


def first_splits(problem: Problem, effort: Effort) -> list[Solution]:
    """The best split of each standard order, the best of all first; empty where no order holds one that fits."""
    bound = load_bound_us(problem.graph, problem.num_stages)
    found: list[Solution] = []
    for order in standard_orders(problem.graph):
        upper = min((s.load_us for s in found), default=np.inf)
        costs = IntervalCosts(problem.graph, order, problem.memory)
        solution = _widening(costs, problem.num_stages, bound, upper, effort)
        if solution is not None:
            found.append(solution)
    return sorted(found, key=lambda s: s.load_us)


def _widening(costs: IntervalCosts, num_stages: int, bound: float, upper: float, effort: Effort) -> Solution | None:
    """Small upper bounds first: they leave few states, and the first one that holds a split holds the best."""
    slack = 0.02
    while bound * (1 + slack) < upper and slack < 1e4:
        solution = best_on(costs, num_stages, bound * (1 + slack), effort)
        if solution is not None:
            return solution
        slack *= 2.5
    return best_on(costs, num_stages, upper, effort)


def improve(problem: Problem, best: Solution, random: Random, effort: Effort, stall: int = STALL) -> Solution:
    """Re-linearises until `stall` orders in a row bring nothing, the bound is met, or the effort is spent."""
    goal = load_bound_us(problem.graph, problem.num_stages) * (1 + CLOSE_ENOUGH)
    idle = turn = 0
    while idle < stall and not effort.spent and best.load_us > goal:
        order = relinearise(problem.graph, best.stage_of, random, turn)
        turn += 1
        found = split_order(problem, order, best.load_us * (1 + TOLERANCE), effort)
        idle += 1
        if found is not None and found.load_us <= best.load_us * (1 + TOLERANCE):
            if found.load_us < best.load_us * (1 - 1e-5):
                idle = 0
            best = found
    return best


__all__ = ["Problem", "Solution", "Split", "first_splits", "improve", "split_order"]
