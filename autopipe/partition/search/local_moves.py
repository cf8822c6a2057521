"""Local search on the simulated step: a node moves to any stage that its neighbours allow, or takes along what must go
with it.

Intervals of one order cannot make these moves one at a time. A node goes down a stage together with its predecessors on
its own stage, up together with its successors there, so every assignment tried is monotone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from autopipe.cost import CostGraph, IntArray
from autopipe.partition.effort import Effort

MOST_MOVED = 12
"""Nodes that go along at most: larger moves are shifts of a cut, which descent over an order makes."""


def polish(
    graph: CostGraph, stage_of: IntArray, num_stages: int, step_us: Callable[[IntArray], float], effort: Effort
) -> IntArray:
    """Makes moves that shorten the step until none does, or the effort is spent."""
    best = step_us(stage_of)
    improved = True
    while improved and not effort.spent:
        improved = False
        for candidate in list(_moves(graph, stage_of, num_stages)):
            if effort.spent:
                break
            moved = _applied(stage_of, candidate, num_stages)
            if moved is None or not _monotone(graph, moved, candidate[0]):
                continue
            if step_us(moved) < best * (1 - 1e-9):
                stage_of, best, improved = moved, step_us(moved), True
    return stage_of


Move = tuple[tuple[int, ...], int]


def _moves(graph: CostGraph, stage_of: IntArray, num_stages: int) -> Iterator[Move]:
    """Nodes that can go together, and how many stages up or down: few of them, each move once."""
    stages = stage_of.tolist()
    seen: set[Move] = set()
    for v, stage in enumerate(stages):
        low = max((stages[u] for u in graph.predecessors[v]), default=0)
        high = min((stages[x] for x in graph.successors[v]), default=num_stages - 1)
        for target in range(low, high + 1):
            if target != stage:
                seen.add(((v,), target - stage))
                yield (v,), target - stage
        for step, neighbours in ((1, graph.successors), (-1, graph.predecessors)):
            if not 0 <= stage + step < num_stages:
                continue
            group = _along(v, stages, neighbours)
            if group is not None and (group, step) not in seen:
                seen.add((group, step))
                yield group, step


def _along(v: int, stages: list[int], neighbours: tuple[tuple[int, ...], ...]) -> tuple[int, ...] | None:
    """v and all that lies beyond it on its own stage, unless that is too much."""
    group, waiting = {v}, [v]
    while waiting:
        for x in neighbours[waiting.pop()]:
            if stages[x] == stages[v] and x not in group:
                group.add(x)
                waiting.append(x)
        if len(group) > MOST_MOVED:
            return None
    return tuple(sorted(group))


def _applied(stage_of: IntArray, move: Move, num_stages: int) -> IntArray | None:
    """The assignment after a move; None where a stage would be left empty, or there is no such stage: others moved
    before."""
    group, step = move
    moved = stage_of.copy()
    moved[list(group)] += step
    inside = moved.min() == 0 and moved.max() == num_stages - 1
    return moved if inside and len(np.unique(moved)) == num_stages else None


def _monotone(graph: CostGraph, stage_of: IntArray, group: tuple[int, ...]) -> bool:
    """Whether no moved node is before what it reads or after what reads it; others may have moved since the list was
    made."""
    return all(
        all(stage_of[u] <= stage_of[v] for u in graph.predecessors[v])
        and all(stage_of[v] <= stage_of[x] for x in graph.successors[v])
        for v in group
    )
