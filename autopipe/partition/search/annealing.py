"""Simulated annealing of a split: single nodes move to the next stage or the one before, now and then for the worse.

Interval DPs (chain.py) see one order at a time, and windows of down-sets (lattice.py) only what lies near. On wide
graphs a border with less traffic can be many moves away, each of which is worse than the one before; annealing
(Kirkpatrick, Gelatt and Vecchi, Science 1983) gets there. What is annealed is

    E = peak + a · mean of the loads,        peak = the largest load, or the estimate H / M of a step

The mean falls with the traffic, so while a is large the borders move to where little crosses, and as it shrinks they
settle. A proposal costs a few microseconds: a move changes the loads of two stages only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np

from autopipe.cost import CostGraph, IntArray, stage_costs
from autopipe.partition.effort import Effort
from autopipe.partition.graph.orders import by_priority
from autopipe.partition.memory.model import run_costs
from autopipe.partition.problem import Problem, Solution

COOLED_EVERY = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Cooling:
    """Length and range of an annealing: temperatures as shares of the mean work of a stage, and a, at the start and at
    the end.

    `proposal_s` and `stage_s`: seconds that a proposal takes by itself, and for each stage that the peak is taken over.
    """

    proposals_a_node: int
    hot: float
    cold: float
    first_weight: float
    last_weight: float
    proposal_s: float
    stage_s: float


FROM_ANYWHERE = Cooling(
    proposals_a_node=660, hot=0.02, cold=0.001, first_weight=0.5, last_weight=0.05, proposal_s=2.3e-6, stage_s=2e-7
)
"""For the largest load, from stages of equal time."""
FROM_BEST = Cooling(
    proposals_a_node=66, hot=0.02, cold=0.0005, first_weight=0.2, last_weight=0.02, proposal_s=2.9e-6, stage_s=1.3e-6
)
"""For the step, from a split with a small load."""
Peak = Callable[[list[float]], float]


def can_anneal(problem: Problem) -> bool:
    """Whether loads decide: memory, rules and unlike devices are not part of the energy."""
    graph = problem.graph
    return not (problem.memory.constrains(graph) or problem.rules.any or graph.devices is not None)


def annealed(
    problem: Problem, start: IntArray, cooling: Cooling, peak: Peak, random: Random, effort: Effort
) -> Solution:
    """The split with the least peak that one cooling passes through, from an assignment; `peak` is of the loads of the
    stages."""
    graph, K = problem.graph, problem.num_stages
    each_s = cooling.proposal_s + cooling.stage_s * K
    proposals = int(min(cooling.proposals_a_node * graph.num_nodes, max(effort.left_s, 0.0) / each_s))
    effort.spend(seconds=each_s * proposals, cells=200 * graph.num_nodes)
    stage_of = Walk(graph, start, K).cool(cooling, peak, proposals, random)
    load = float(run_costs(graph, problem.memory, stage_of, K).load_us.max())
    key = (stage_of * 1e7 + np.arange(graph.num_nodes)).tolist()
    order = np.array(by_priority(graph.successors, graph.predecessors, key), np.int64)
    return Solution(load_us=load, stage_of=stage_of, order=order)


def step_peak(problem: Problem) -> Peak:
    """H / M of loads, for stages in a line that all have the same share of forward: a step takes about M times that."""
    graph, K, M = problem.graph, problem.num_stages, problem.memory.num_microbatches
    share = float(graph.forward_us.sum()) / max(float(graph.work_us.sum()), 1e-30)

    def peak(load: list[float]) -> float:
        before, after, longest = 0.0, sum(load), 0.0
        for q, t in enumerate(load):
            after -= t
            f = share * t
            path = max(M * t, f + after + M * (t - f), M * f + after + t - f)
            if K - q < M:
                path = max(path, (M - K + q + 1) * t + 2 * after)
            longest = max(longest, before + path)
            before += t
        return longest / M

    return peak


class Walk:
    """An assignment, the loads of its stages without latencies, and the moves that keep it monotone."""

    def __init__(self, graph: CostGraph, stage_of: IntArray, num_stages: int) -> None:
        self.graph, self.K, n = graph, num_stages, graph.num_nodes
        self.stage: list[int] = stage_of.tolist()
        self.load: list[float] = stage_costs(graph, stage_of, num_stages).load_us.tolist()
        self.size: list[int] = np.bincount(stage_of, minlength=num_stages).tolist()
        self.work: list[float] = graph.work_us.tolist()
        both = graph.tensor_bytes + graph.gradient_bytes
        self.cost: list[float] = (both * (graph.exposed / graph.link.bytes_per_us)).tolist()
        self.maker: list[int] = graph.producer.tolist()
        self.made: list[list[int]] = [[] for _ in range(n)]
        self.read: list[list[int]] = [[] for _ in range(n)]
        self.readers = [[0] * num_stages for _ in self.maker]
        self.num_readers = [0] * len(self.maker)
        for t, v in enumerate(self.maker):
            self.made[v].append(t)
        for t, v in zip(graph.tensor_readers.owner.tolist(), graph.tensor_readers.node.tolist(), strict=True):
            self.read[v].append(t)
            self.readers[t][self.stage[v]] += 1
            self.num_readers[t] += 1
        self.behind = [sum(self.stage[u] == self.stage[v] for u in graph.predecessors[v]) for v in range(n)]
        self.ahead = [sum(self.stage[x] == self.stage[v] for x in graph.successors[v]) for v in range(n)]
        self.moves: list[tuple[int, int]] = []
        self.place: dict[tuple[int, int], int] = {}
        for v in range(n):
            self._offer(v)

    def cool(self, cooling: Cooling, peak: Peak, proposals: int, random: Random) -> IntArray:
        """The assignment with the least peak on the way from hot to cold."""
        mean, draw, load, moves = sum(self.work) / self.K, random.random, self.load, self.moves
        best, found = peak(load), list(self.stage)
        hot = weight = energy = 0.0
        for i in range(proposals):
            if i % COOLED_EVERY == 0:
                done = i / proposals
                hot = mean * cooling.hot * (cooling.cold / cooling.hot) ** done
                weight = cooling.first_weight * (cooling.last_weight / cooling.first_weight) ** done / self.K
                energy = peak(load) + weight * sum(load)
            if not moves:
                break
            v, step = moves[int(draw() * len(moves))]
            source = self.stage[v]
            target = source + step
            if self.size[source] == 1:
                continue
            less, more = self._change(v, source, target)
            load[source] += less
            load[target] += more
            height = peak(load)
            moved = height + weight * sum(load)
            if moved <= energy or draw() < math.exp((energy - moved) / hot):
                energy = moved
                self._move(v, source, target)
                if height < best:
                    best, found = height, list(self.stage)
            else:
                load[source] -= less
                load[target] -= more
        return np.array(found, np.int64)

    def _change(self, v: int, source: int, target: int) -> tuple[float, float]:
        """Change of the loads of the two stages by a move."""
        less, more = -self.work[v], self.work[v]
        stage, maker, readers, number, cost = self.stage, self.maker, self.readers, self.num_readers, self.cost
        for t in self.read[v]:
            at, here = stage[maker[t]], readers[t]
            if at == source:
                if here[source] == number[t]:
                    less += cost[t]
                if not here[target]:
                    more += cost[t]
            elif at == target:
                if here[source] == 1:
                    less -= cost[t]
                if number[t] - here[target] == 1:
                    more -= cost[t]
            else:
                if here[source] == 1:
                    less -= cost[t]
                if not here[target]:
                    more += cost[t]
        for t in self.made[v]:
            here = readers[t]
            if number[t] > here[source]:
                less -= cost[t]
            if here[source]:
                less += cost[t]
            if number[t] > here[target]:
                more += cost[t]
            if here[target]:
                more -= cost[t]
        return less, more

    def _move(self, v: int, source: int, target: int) -> None:
        stage, ahead, behind = self.stage, self.ahead, self.behind
        self.size[source] -= 1
        self.size[target] += 1
        for t in self.read[v]:
            self.readers[t][source] -= 1
            self.readers[t][target] += 1
        stage[v], ahead[v], behind[v] = target, 0, 0
        for u in self.graph.predecessors[v]:
            if stage[u] == source:
                ahead[u] -= 1
                self._offer(u)
            elif stage[u] == target:
                ahead[u] += 1
                behind[v] += 1
                self._offer(u)
        for x in self.graph.successors[v]:
            if stage[x] == source:
                behind[x] -= 1
                self._offer(x)
            elif stage[x] == target:
                behind[x] += 1
                ahead[v] += 1
                self._offer(x)
        self._offer(v)

    def _offer(self, v: int) -> None:
        """Adds or takes back the moves of a node: up with no reader on its stage, down with nothing that it reads
        there."""
        stage = self.stage[v]
        for step, free in ((1, not self.ahead[v] and stage < self.K - 1), (-1, not self.behind[v] and stage > 0)):
            move = (v, step)
            if free and move not in self.place:
                self.place[move] = len(self.moves)
                self.moves.append(move)
            elif not free and move in self.place:
                at, last = self.place.pop(move), self.moves.pop()
                if last != move:
                    self.moves[at] = last
                    self.place[last] = at
