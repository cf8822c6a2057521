"""A lower bound on the largest load of graphs that are nearly a line: one chain is kept, all other work may go
anywhere.

Let C be the heaviest path of the graph. Any split of the graph splits C in its order, with loads t(i, j) that are no
larger than those of the stages they are parts of, less the work of the other nodes there. So no split stays below U
unless the chain has one, empty stages allowed, that leaves room for the rest:

    F_k[j] = min over i <= j with t(i, j) <= U of F_(k-1)[i] + t(i, j),        F_K[|C|] + work outside C <= K U

and the least such U, found by bisection, is a bound. In a U-Net it counts the skips that every border must let through.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from autopipe.cost import CostGraph, FloatArray, IntArray, Readers
from autopipe.partition.dp.intervals import IntervalCosts
from autopipe.partition.effort import Effort

ROWS = 256
PRECISION = 2e-5
MOST_FLUID = 0.1
"""The share of the work outside the chain above which the bound is hardly better than the mean."""


def fluid_bound_us(graph: CostGraph, num_stages: int, low_us: float, upper_us: float, effort: Effort) -> float:
    """A largest load that no split beats, at least `low_us`, which is a bound too, and at most `upper_us`, which is
    possible."""
    chain = heaviest_path(graph)
    line = _along(graph, chain)
    rest = float(graph.work_us.sum()) - float(line.work_us.sum())
    if rest > MOST_FLUID * float(graph.work_us.sum()) or low_us >= upper_us * (1 - PRECISION):
        return low_us
    blocks = _blocks(line, upper_us)
    cells = sum(load.size for _, load in blocks)
    effort.spend(cells=20 * graph.num_nodes + 4 * cells)
    low, high = low_us, upper_us
    while high > low * (1 + PRECISION) and not effort.spent:
        middle = (low + high) / 2
        effort.spend(cells=0.3 * cells * num_stages)
        if _least_sum(blocks, line.num_nodes, num_stages, middle) + rest <= num_stages * middle:
            high = middle
        else:
            low = middle
    return low


def heaviest_path(graph: CostGraph) -> IntArray:
    """The nodes of the path with the most work; nodes are numbered in topological order."""
    total, before = graph.work_us.copy(), [-1] * graph.num_nodes
    for v, predecessors in enumerate(graph.predecessors):
        if predecessors:
            before[v] = max(predecessors, key=total.__getitem__)
            total[v] += total[before[v]]
    v, path = int(total.argmax()), list[int]()
    while v >= 0:
        path.append(v)
        v = before[v]
    return np.array(path[::-1], np.int64)


def _along(graph: CostGraph, nodes: IntArray) -> CostGraph:
    """The line of these nodes, with the tensors that one of them makes and another reads."""
    index = np.full(graph.num_nodes, -1, np.int64)
    index[nodes] = np.arange(len(nodes))
    readers = graph.tensor_readers
    inside = (index[readers.node] >= 0) & (index[graph.producer[readers.owner]] >= 0)
    kept, owner = np.unique(readers.owner[inside], return_inverse=True)
    last = len(nodes) - 1
    return dataclasses.replace(
        graph,
        members=tuple(graph.members[v] for v in nodes.tolist()),
        forward_us=graph.forward_us[nodes],
        backward_us=graph.backward_us[nodes],
        predecessors=tuple((v - 1,) if v else () for v in range(len(nodes))),
        successors=tuple((v + 1,) if v < last else () for v in range(len(nodes))),
        producer=index[graph.producer[kept]],
        tensor_bytes=graph.tensor_bytes[kept],
        gradient_bytes=graph.gradient_bytes[kept],
        tensor_names=tuple(graph.tensor_names[t] for t in kept.tolist()),
        tensor_readers=Readers(owner=owner.astype(np.int64), node=index[readers.node[inside]]),
    )


def _blocks(line: CostGraph, upper_us: float) -> list[tuple[int, FloatArray]]:
    """Loads of all intervals that may stay below the upper bound: first start, and (starts, ends) from the one after
    it."""
    n = line.num_nodes
    costs = IntervalCosts(line, np.arange(n))
    blocks = []
    for first in range(0, n, ROWS):
        last = min(first + ROWS, n) - 1
        end = min(int(np.searchsorted(costs.work, costs.work[last] + upper_us * (1 + 1e-9), "right")), n)
        blocks.append((first, costs.load_us((first, last), (first + 1, end))))
    return blocks


def _least_sum(blocks: list[tuple[int, FloatArray]], n: int, num_stages: int, most_us: float) -> float:
    """F_K[n]: the least sum of loads of at most K intervals that cover the line, none above `most_us`."""
    allowed = [(first, np.where(load <= most_us * (1 + 1e-9), load, np.inf)) for first, load in blocks]
    least = np.full(n + 1, np.inf)
    least[0] = 0.0
    for _ in range(num_stages):
        after = least.copy()
        for first, load in allowed:
            start = least[first : first + len(load)]
            if np.isfinite(start).any():
                ends = after[first + 1 : first + 1 + load.shape[1]]
                np.minimum(ends, (start[:, None] + load).min(axis=0), out=ends)
        least = after
    return float(least[n])
