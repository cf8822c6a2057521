"""The dynamic program over down-sets: splits that no single order holds, and the proof that none is better.

With a pool of down-sets for every border, t_k(a, b) the load of the stage b - a as stage k:

    F_k[b] = min over a < b of max(F_(k-1)[a], t_k(a, b))

It is the DP over ideals of Tarnawski et al. (NeurIPS 2020), with the ideals of each border only, in the window that a
split as good as the best one known must keep to. Where every window was enumerated whole, the result is the optimum.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np

from autopipe.cost import FloatArray, IntArray
from autopipe.partition.dp.downset_pairs import Pairs
from autopipe.partition.dp.interval_dp import TOLERANCE
from autopipe.partition.effort import Effort
from autopipe.partition.graph.downsets import BoolArray, Lattice, Pool
from autopipe.partition.graph.orders import by_priority, relinearise, standard_orders
from autopipe.partition.problem import Problem, Solution

FIRST_LIMIT, LAST_LIMIT = 300, 2400
BANDS = (0.05, 0.15, 0.4)
"""Half widths of the local windows around the cuts, as shares of the mean work of a stage."""
NOISES = (0.0, 0.3, 1.5)
SWEEPS = 3
"""Passes in a row without a better split after which the search ends: the next would take four times as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """A solution, and a largest load that no split of the graph can beat; 0 where nothing is known."""

    solution: Solution
    bound_us: float


def refine(
    problem: Problem, best: Solution, random: Random, effort: Effort, goal_us: float, *, merged: bool = False
) -> Refined:
    """Improves a solution, window by window, until it is proved optimal, meets the goal, or the effort is spent.

    Args:
        merged: the graph is a reduced one; a bound for the whole graph must then allow for stages that are empty in it.
    """
    lattice = Lattice(problem.graph)
    effort.spend(cells=0.7 * problem.graph.num_nodes**2)
    sweep = _Sweep(problem, lattice, random, effort, merged)
    limit, turn, idle = FIRST_LIMIT, 0, 0
    while not effort.spent and best.load_us > goal_us and idle < SWEEPS:
        mean = lattice.total / problem.num_stages
        band = None if turn % 2 == 0 else BANDS[turn // 2 % len(BANDS)] * mean
        found, bound = sweep.run(best, limit, NOISES[turn % 3], band)
        turn += 1
        idle += 1
        if found is not None and found.load_us < best.load_us * (1 - 1e-5):
            idle = 0
        if found is not None and found.load_us <= best.load_us * (1 + TOLERANCE):
            best = found
        if bound is not None:
            return Refined(solution=best, bound_us=min(bound, best.load_us))
        if idle:
            limit = min(limit * 2, LAST_LIMIT)
    return Refined(solution=best, bound_us=0.0)


class _Sweep:
    """One pass: a pool for every border, then the DP over the pools."""

    def __init__(self, problem: Problem, lattice: Lattice, random: Random, effort: Effort, merged: bool) -> None:
        self.problem, self.lattice, self.random, self.effort, self.merged = problem, lattice, random, effort, merged
        self.orders = standard_orders(problem.graph)

    def run(
        self, best: Solution, limit: int, noise: float, band_us: float | None
    ) -> tuple[Solution | None, float | None]:
        """The best split through the pools, and the optimum where the pools are complete."""
        K, graph = self.problem.num_stages, self.problem.graph
        upper = best.load_us * (1 + TOLERANCE)
        positions = [np.argsort(order) for order in self._orders(best)]
        pools = [self.lattice.single(np.zeros(graph.num_nodes, bool))]
        for k in range(1, K):
            if self.effort.spent:
                return None, None
            pools.append(self._pool(best, k, positions, upper, limit, noise, band_us))
        pools.append(self.lattice.single(np.ones(graph.num_nodes, bool)))
        complete = all(pool.complete for pool in pools)
        return self._through(pools, upper, complete)

    def _orders(self, best: Solution) -> list[IntArray]:
        return self.orders + [
            relinearise(self.problem.graph, best.stage_of, self.random, flavour) for flavour in range(4)
        ]

    def _pool(
        self,
        best: Solution,
        k: int,
        positions: list[IntArray],
        upper: float,
        limit: int,
        noise: float,
        band_us: float | None,
    ) -> Pool:
        """Down-sets for the border before stage k, the one of the best solution always among them."""
        lattice, K = self.lattice, self.problem.num_stages
        current = best.stage_of < k
        low, high = lattice.total - (K - k) * upper, k * upper
        local = band_us is not None
        if band_us is not None:
            here = float(lattice.work[current].sum())
            low, high = max(low, here - band_us), min(high, here + band_us)
        seeds = np.array([current, *self._seeds(positions, low, high, limit // 10)])
        pool = lattice.window(seeds, low, high, limit, noise, self.random, local=local)
        self.effort.spend(states=(len(pool.work) + len(seeds)) * (1 + len(pool.universe) / 150))
        return _with(pool, current, lattice)

    def _seeds(self, positions: list[IntArray], low: float, high: float, count: int) -> Iterator[BoolArray]:
        """Prefixes of the orders whose work lies in the window."""
        for position in positions:
            work = np.cumsum(self.lattice.work[np.argsort(position)])
            first, last = int(np.searchsorted(work, low, "left")), int(np.searchsorted(work, high, "right"))
            ends = range(first, last)
            for end in ends if len(ends) <= count else sorted(self.random.sample(ends, count)):
                yield position <= end

    def _through(self, pools: list[Pool], upper: float, complete: bool) -> tuple[Solution | None, float | None]:
        """The DP over the pools, no stage empty; and the bound, where the pools are complete."""
        least, relaxed = np.zeros(1), np.zeros(1)
        loads: list[FloatArray] = []
        for k, (before, after) in enumerate(itertools.pairwise(pools)):
            pairs = Pairs(self.problem.graph, before, after)
            load = pairs.load_us()
            choices = len(self.problem.graph.classes) if self.problem.memory.constrains(self.problem.graph) else 0
            self.effort.spend(cells=load.size * (1 + 0.3 * choices + len(pairs.tensors) / 300))
            if self.problem.memory.constrains(self.problem.graph):
                wanted = np.isfinite(load) & ~pairs.equal
                load = load + pairs.added_us(self.problem.memory, k, self.problem.num_stages, wanted)
            if self.problem.rules.any:
                load[pairs.forbidden(self.problem.rules, k, self.problem.num_stages)] = np.inf
            if self.merged:
                relaxed = np.maximum(relaxed[:, None], load).min(axis=0)
            load[pairs.equal] = np.inf
            load[load > upper] = np.inf
            least = np.maximum(least[:, None], load).min(axis=0)
            loads.append(load)
        bound = float((relaxed if self.merged else least)[0]) if complete else None
        if not np.isfinite(least[0]):
            return None, bound
        return self._trace(pools, loads, float(least[0])), bound

    def _trace(self, pools: list[Pool], loads: list[FloatArray], value: float) -> Solution:
        graph, K = self.problem.graph, self.problem.num_stages
        reachable = [np.ones(1, bool)]
        for load in loads:
            reachable.append(np.asarray(((load <= value * (1 + TOLERANCE)) & reachable[-1][:, None]).any(axis=0)))
        stage_of = np.full(graph.num_nodes, K - 1, np.int64)
        at = 0
        for k in range(K - 1, 0, -1):
            at = int(np.flatnonzero((loads[k][:, at] <= value * (1 + TOLERANCE)) & reachable[k])[0])
            stage_of[pools[k].whole(at)] = k - 1
        order = by_priority(
            graph.successors, graph.predecessors, (stage_of * 1e7 + np.arange(graph.num_nodes)).tolist()
        )
        return Solution(load_us=value, stage_of=stage_of, order=np.array(order, np.int64))


def _with(pool: Pool, members: BoolArray, lattice: Lattice) -> Pool:
    """The pool with one more down-set, unless it is there."""
    mine = members[pool.universe].astype(np.uint8)
    fits = bool((pool.base <= members).all()) and not bool((members & ~pool.base)[_outside(pool)].any())
    if fits and (not len(pool.universe) or (pool.bits == mine).all(axis=1).any()) and len(pool.work):
        return pool
    if fits:
        bits = np.vstack([pool.bits, mine])
        work = np.append(pool.work, float(lattice.work[members].sum()))
        return Pool(base=pool.base, universe=pool.universe, bits=bits, work=work, complete=pool.complete)
    raise AssertionError("the border of the best solution lies in its own window")


def _outside(pool: Pool) -> BoolArray:
    outside = np.ones(len(pool.base), bool)
    outside[pool.universe] = False
    return outside
