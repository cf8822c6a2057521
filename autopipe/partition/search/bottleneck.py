"""The search for the least largest load over several orders of the graph.

One interval DP (chain.py) is exact for its order. The search takes the standard orders, then keeps re-linearising: an
order in which the stages found are still intervals, shuffled inside them, holds the split found and about n^K others,
so the next DP is at least as good. Kicks and further starts leave local optima. Large graphs are cut on a grid: coarse
over the whole order, then fine around the cuts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import islice
from random import Random

import numpy as np

from autopipe.cost import IntArray
from autopipe.partition.bounds import load_bound_us
from autopipe.partition.dp.grids import grid
from autopipe.partition.dp.interval_dp import TOLERANCE, best_split
from autopipe.partition.dp.intervals import IntervalCosts
from autopipe.partition.effort import Effort
from autopipe.partition.graph.orders import depth_first, relinearise, standard_orders
from autopipe.partition.memory.model import run_costs, stage_memory
from autopipe.partition.problem import Problem, Solution

FIRST_GRID = 400
BANDS = (0.6, 0.15, 0.03)
"""Widths of the fine grids around the cuts, as shares of the mean work of a stage."""
STALL, KICKS = 10, 8
"""Orders, and kicks, in a row without a better split after which a descent, and a start, are given up."""
NOISE, ACCEPTED = 0.3, 1.003
"""Size of a kick's random factors (their logarithm's deviation), and how much worse a split may be to go on from it."""
CLOSE_ENOUGH = 1e-4
"""A load this close to the bound, relatively, is not worth more search."""


def split_order(
    problem: Problem, order: IntArray, upper_us: float, effort: Effort, positions: IntArray | None = None
) -> Solution | None:
    """The best split of one order, at these positions, whose largest load is at most `upper_us`."""
    costs = IntervalCosts(problem.graph, order, problem.memory, positions, problem.rules)
    effort.spend(cells=15 * problem.graph.num_nodes + 1e4)
    split = best_split(costs, problem.num_stages, upper_us, effort)
    if split is None:
        return None
    return Solution(load_us=split.load_us, stage_of=costs.stages(split.cuts), order=order)


def first_splits(problem: Problem, effort: Effort) -> list[Solution]:
    """The best split of each standard order, the best of all first; empty where no order holds one that fits."""
    found: list[Solution] = []
    for given in standard_orders(problem.graph):
        order = problem.rules.arranged(problem.graph, given)
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
    for band in BANDS:
        positions = _fine_grid(problem, order, best.stage_of, band)
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
    idle = turn = 0
    while idle < stall and not effort.spent and best.load_us > goal_us:
        order = relinearise(graph, best.stage_of, random, turn)
        effort.spend(cells=40 * graph.num_nodes)
        positions = _fine_grid(problem, order, best.stage_of, BANDS[turn % len(BANDS)])
        turn += 1
        found = split_order(problem, order, best.load_us * (1 + TOLERANCE), effort, positions)
        idle += 1
        if found is not None and found.load_us <= best.load_us * (1 + TOLERANCE):
            if found.load_us < best.load_us * (1 - 1e-5):
                idle = 0
            best = found
    return best


def search(
    problem: Problem, starts: Iterable[Solution], random: Random, effort: Effort, rounds: int, goal_us: float
) -> Solution:
    """The best of several descents, at most `rounds`; the first start is the best known.

    Each descent is kicked out of its local optimum by the noising method (Charon and Hudry, 1993): a few steps under
    costs that are off by a random factor, then descent under the true ones, until `KICKS` kicks in a row bring nothing.
    """
    best: Solution | None = None
    for start in islice(starts, rounds):
        found = _descend_with_kicks(problem, start, random, effort, goal_us)
        best = found if best is None else min(best, found, key=lambda s: s.load_us)
        if effort.spent or best.load_us <= goal_us:
            break
    assert best is not None, "at least one round and one start"
    return best


def random_starts(problem: Problem, upper_us: float, random: Random, effort: Effort) -> Iterator[Solution]:
    """The best splits of random depth-first orders, of those whose largest load is at most `upper_us`; ends with the
    effort."""
    ahead, back, turn = problem.graph.successors, problem.graph.predecessors, 0
    while not effort.spent:
        order = depth_first(ahead, back, random=random) if turn % 2 else depth_first(back, ahead, random=random)[::-1]
        arranged = problem.rules.arranged(problem.graph, np.array(order, np.int64))
        start = split_coarse_to_fine(problem, arranged, upper_us, effort)
        turn += 1
        if start is not None:
            yield start


def _descend_with_kicks(problem: Problem, start: Solution, random: Random, effort: Effort, goal_us: float) -> Solution:
    current = best = improve(problem, start, random, effort, goal_us, STALL)
    idle = 0
    while idle < KICKS and not effort.spent and best.load_us > goal_us:
        kicked = kick(problem, current, random, effort)
        found = improve(problem, kicked, random, effort, goal_us, STALL)
        idle += 1
        if found.load_us <= current.load_us * ACCEPTED:
            current = found
        if found.load_us < best.load_us * (1 - 1e-5):
            best, idle = found, 0
    return best


def kick(problem: Problem, solution: Solution, random: Random, effort: Effort) -> Solution:
    """Two steps of re-linearisation under noised times and tensor sizes."""
    graph, rng = problem.graph, np.random.default_rng(random.randrange(2**32))
    node, tensor = (np.exp(NOISE * rng.standard_normal(size)) for size in (graph.num_nodes, len(graph.producer)))
    noised = dataclasses.replace(
        graph,
        forward_us=graph.forward_us * node,
        backward_us=graph.backward_us * node,
        tensor_bytes=graph.tensor_bytes * tensor,
        gradient_bytes=graph.gradient_bytes * tensor,
    )
    other = dataclasses.replace(problem, graph=noised)
    stage_of = solution.stage_of
    for _ in range(2):
        order = relinearise(noised, stage_of, random, random.randrange(4))
        load = float(run_costs(noised, problem.memory, stage_of, problem.num_stages).load_us.max())
        found = split_order(other, order, load * (1 + TOLERANCE), effort, _fine_grid(other, order, stage_of, BANDS[0]))
        if found is not None:
            stage_of = found.stage_of
    if not problem.memory.fits(stage_memory(graph, problem.memory, stage_of, problem.num_stages).peak_bytes):
        return solution
    if problem.rules.broken(stage_of, problem.num_stages):
        return solution
    load = float(run_costs(graph, problem.memory, stage_of, problem.num_stages).load_us.max())
    return Solution(load_us=load, stage_of=stage_of, order=solution.order if found is None else found.order)


def _fine_grid(problem: Problem, order: IntArray, stage_of: IntArray, band: float) -> IntArray | None:
    """Positions around the cuts of an assignment; None, for all positions, on a graph of ordinary size."""
    graph = problem.graph
    if graph.num_nodes < problem.positions:
        return None
    cuts = np.cumsum(np.bincount(stage_of, minlength=problem.num_stages))[:-1]
    mean = float(graph.work_us.sum()) / problem.num_stages
    return grid(graph, order, problem.positions, around=cuts, band_us=band * mean)
