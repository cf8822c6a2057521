"""The least largest load, from the first orders to the proof: reduction, interval DPs, re-linearisation, down-sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import chain, islice
from random import Random

import numpy as np

from autopipe.cost import IntArray
from autopipe.partition.baselines import equal_time
from autopipe.partition.bounds import load_bound_us
from autopipe.partition.constraints import impossible
from autopipe.partition.dp.chain_bound import fluid_bound_us
from autopipe.partition.dp.downset_dp import Refined, refine
from autopipe.partition.dp.interval_dp import TOLERANCE
from autopipe.partition.effort import Effort
from autopipe.partition.graph.reduce import reduced
from autopipe.partition.infeasible import least_peak_split, too_little_memory
from autopipe.partition.problem import Problem, Solution
from autopipe.partition.search.annealing import FROM_ANYWHERE, annealed, can_anneal
from autopipe.partition.search.bottleneck import CLOSE_ENOUGH, first_splits, improve, random_starts, search, split_order

ROUNDS = 60
"""Starts of the search at most."""
SMALL = 24
"""Nodes up to which the graph is searched as it is: reduction saves nothing, and may hide a stage of idle nodes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """A problem after reduction, and (n) the node of it that stands for each node of the graph."""

    problem: Problem
    index: IntArray

    @property
    def merged(self) -> bool:
        """Whether any nodes were merged."""
        return self.problem.graph.num_nodes < len(self.index)


def reduce_problem(problem: Problem) -> Reduced:
    """The problem on the reduced graph, where that is worth it, leaves enough nodes, and no node has a place."""
    n = problem.graph.num_nodes
    if n > SMALL and not problem.rules.any:
        graph, index = reduced(problem.graph, limited=problem.memory.constrains(problem.graph))
        if graph.num_nodes >= problem.num_stages:
            return Reduced(problem=dataclasses.replace(problem, graph=graph), index=index)
    return Reduced(problem=problem, index=np.arange(n))


def least_load(small: Reduced, random: Random, effort: Effort) -> tuple[list[Solution], Refined]:
    """The best split of each standard order, and the best split found with the bound that was proved.

    Raises:
        PartitionError: no split fits into memory.
    """
    problem = small.problem
    bound = load_bound_us(problem.graph, problem.num_stages)
    goal = bound * (1 + CLOSE_ENOUGH)
    starts = first_splits(problem, effort)
    if not starts:
        starts = [_any_that_fits(problem, random, effort)]
    best = improve(problem, starts[0], random, effort, goal, stall=10)
    bound = fluid_bound_us(problem.graph, problem.num_stages, bound, best.load_us, effort)
    goal = bound * (1 + CLOSE_ENOUGH)
    found = _proved_further(small, Refined(solution=best, bound_us=bound), random, effort, 0.35, goal)
    if found.bound_us < found.solution.load_us * (1 - CLOSE_ENOUGH) and not effort.spent:
        best = _searched_further(problem, [found.solution, *starts[1:]], random, effort, goal)
        found = _proved_further(small, Refined(solution=best, bound_us=found.bound_us), random, effort, 1.0, goal)
    return starts, _with_least_traffic(problem, found, effort)


def _searched_further(
    problem: Problem, starts: list[Solution], random: Random, effort: Effort, goal: float
) -> Solution:
    """From the best start, then in turn from annealed ones, the others given, and random ones."""
    part = effort.share(0.8)
    budget = part.left_s
    others = chain(starts[1:], random_starts(problem, 2 * starts[0].load_us, random, part))
    fresh = _alternating(_annealed_starts(problem, random, part), others) if can_anneal(problem) else others
    best = search(problem, chain(starts[:1], fresh), random, part, ROUNDS, goal)
    effort.spend(seconds=budget - part.left_s)
    return best


def _annealed_starts(problem: Problem, random: Random, effort: Effort) -> Iterator[Solution]:
    start = equal_time(problem.graph, problem.num_stages)
    while not effort.spent:
        yield annealed(problem, start, FROM_ANYWHERE, max, random, effort)


def _alternating(one: Iterator[Solution], other: Iterator[Solution]) -> Iterator[Solution]:
    for first in one:
        yield first
        yield from islice(other, 1)


def _proved_further(
    small: Reduced, found: Refined, random: Random, effort: Effort, share: float, goal: float
) -> Refined:
    speed = small.problem.graph.speed(small.problem.num_stages)
    if speed.min() < speed.max():  # the lattice counts every stage alike
        return found
    part = effort.share(share)
    budget = part.left_s
    refined = refine(small.problem, found.solution, random, part, goal, merged=small.merged)
    effort.spend(seconds=budget - part.left_s)
    return Refined(solution=refined.solution, bound_us=max(refined.bound_us, found.bound_us))


def _with_least_traffic(problem: Problem, found: Refined, effort: Effort) -> Refined:
    """The same load with less traffic, where the order of the solution holds such a split."""
    best = found.solution
    if problem.graph.num_nodes >= problem.positions:
        return found
    again = split_order(problem, best.order, best.load_us * (1 + TOLERANCE), effort)
    return (
        found
        if again is None or again.load_us > best.load_us * (1 + TOLERANCE)
        else Refined(solution=again, bound_us=found.bound_us)
    )


def _any_that_fits(problem: Problem, random: Random, effort: Effort) -> Solution:
    """A split that fits where no standard order holds one: through all the down-sets, if they are not too many."""
    if problem.rules.any:
        return _any_that_obeys(problem, effort)
    nearest = least_peak_split(problem)
    graph = problem.graph
    everything = float(graph.work_us.sum()) + 4 * graph.exposed * (
        float((graph.tensor_bytes + graph.gradient_bytes).sum()) * problem.num_stages / graph.link.bytes_per_us
        + graph.link.latency_us
    )
    everything += max(float(way.recompute_us.sum()) for way in graph.classes)
    start = Solution(load_us=everything, stage_of=nearest, order=np.arange(graph.num_nodes))
    found = refine(problem, start, random, effort.share(0.5), 0.0).solution
    if found is start:
        raise too_little_memory(problem, nearest)
    return found


def _any_that_obeys(problem: Problem, effort: Effort) -> Solution:
    """Raises for a problem of which no standard order holds a solution: the rules alone are at fault, or memory is
    too."""
    if problem.memory.constrains(problem.graph):
        memory = dataclasses.replace(problem.memory, limit_bytes=np.inf, limits=())
        without = first_splits(dataclasses.replace(problem, memory=memory), effort)
        if without:
            raise too_little_memory(problem, without[0].stage_of)
    raise impossible(problem.rules, problem.num_stages)
