"""Topological orders of a graph: several that models tend to have, and random ones that respect stages already found.

An interval DP finds the best split of one order. Which splits an order holds depends on where it puts the branches, so
several are tried: program order, as late as possible, depth first from both ends, and least live data first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from random import Random

import numpy as np

from autopipe.cost import CostGraph, IntArray

Neighbours = Sequence[Sequence[int]]


def standard_orders(graph: CostGraph) -> list[IntArray]:
    """The orders that are always tried, without repetition; program order first."""
    n = graph.num_nodes
    ahead, back = graph.successors, graph.predecessors
    program = list(range(n))
    candidates = [
        program,
        by_priority(back, ahead, [-v for v in program])[::-1],
        depth_first(ahead, back),
        depth_first(ahead, back, last_first=True),
        depth_first(back, ahead, last_first=True)[::-1],
        least_live(graph),
    ]
    seen: dict[tuple[int, ...], IntArray] = {}
    for order in candidates:
        seen.setdefault(tuple(order), np.array(order, np.int64))
    return list(seen.values())


def by_priority(ahead: Neighbours, back: Neighbours, key: Sequence[float]) -> list[int]:
    """Kahn's algorithm: of the nodes whose predecessors are done, the one with the smallest key is next.

    With `ahead` and `back` exchanged it starts from the outputs; reversed, that is an order as late as possible.
    """
    waiting = [len(nodes) for nodes in back]
    ready = [(key[v], v) for v in range(len(back)) if not waiting[v]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, v = heapq.heappop(ready)
        order.append(v)
        for x in ahead[v]:
            waiting[x] -= 1
            if not waiting[x]:
                heapq.heappush(ready, (key[x], x))
    return order


def depth_first(
    ahead: Neighbours, back: Neighbours, *, last_first: bool = False, random: Random | None = None
) -> list[int]:
    """A branch is finished before the next is begun; the order of branches is that of the program, its reverse, or
    random."""
    waiting = [len(nodes) for nodes in back]

    def pushed(nodes: list[int]) -> list[int]:
        if random is not None:
            random.shuffle(nodes)
            return nodes
        return sorted(nodes, reverse=not last_first)

    stack = pushed([v for v in range(len(back)) if not waiting[v]])
    order = []
    while stack:
        v = stack.pop()
        order.append(v)
        freed = []
        for x in ahead[v]:
            waiting[x] -= 1
            if not waiting[x]:
                freed.append(x)
        stack += pushed(freed)
    return order


def least_live(graph: CostGraph) -> list[int]:
    """Greedy minimum cut: of the nodes that are ready, the one after which the fewest bytes are live is next."""
    n = graph.num_nodes
    touched: list[list[int]] = [[] for _ in range(n)]
    for t, p in enumerate(graph.producer.tolist()):
        touched[p].append(t)
    for t, v in zip(graph.tensor_readers.owner.tolist(), graph.tensor_readers.node.tolist(), strict=True):
        touched[v].append(t)
    unread = np.bincount(graph.tensor_readers.owner, minlength=len(graph.producer)).tolist()
    maker, num_bytes = graph.producer.tolist(), graph.tensor_bytes.tolist()
    waiting = [len(nodes) for nodes in graph.predecessors]

    def change(v: int) -> float:
        return sum(num_bytes[t] if maker[t] == v else -num_bytes[t] if unread[t] == 1 else 0.0 for t in touched[v])

    ready = {v: change(v) for v in range(n) if not waiting[v]}
    readers: list[list[int]] = [[] for _ in maker]
    for t, v in zip(graph.tensor_readers.owner.tolist(), graph.tensor_readers.node.tolist(), strict=True):
        readers[t].append(v)
    order: list[int] = []
    while ready:
        v = min(ready, key=lambda u: (ready[u], u))
        del ready[v]
        order.append(v)
        for t in touched[v]:
            if maker[t] != v:
                unread[t] -= 1
                if unread[t] == 1:
                    for u in readers[t]:
                        if u in ready:
                            ready[u] = change(u)
        for x in graph.successors[v]:
            waiting[x] -= 1
            if not waiting[x]:
                ready[x] = change(x)
    return order


def relinearise(graph: CostGraph, stage_of: IntArray, random: Random, flavour: int) -> IntArray:
    """A random order in which the given stages are still intervals, so that the DP over it is at least as good.

    Args:
        flavour: 0 shuffles each stage, 1 jitters the program order, 2 and 3 go depth first from the inputs or the
            outputs.
    """
    ahead, back, stages = graph.successors, graph.predecessors, stage_of.tolist()
    flavour %= 4
    if flavour < 2:
        width = random.choice([1, 3, 10, 30, 100])
        jitter: Callable[[int], float] = (
            (lambda v: random.random()) if not flavour else (lambda v: random.gauss(v, width))
        )
        stride = 1e7 + graph.num_nodes
        return np.array(by_priority(ahead, back, [s * stride + jitter(v) for v, s in enumerate(stages)]), np.int64)
    if flavour == 2:
        return np.array(_depth_first_in_stages(ahead, back, stages, random), np.int64)
    reverse = [-s for s in stages]
    return np.array(_depth_first_in_stages(back, ahead, reverse, random)[::-1], np.int64)


def _depth_first_in_stages(ahead: Neighbours, back: Neighbours, stages: list[int], random: Random) -> list[int]:
    waiting = [len(nodes) for nodes in back]
    roots: dict[int, list[int]] = {s: [] for s in sorted(set(stages))}
    for v, count in enumerate(waiting):
        if not count:
            roots[stages[v]].append(v)
    order = []
    for stage, stack in roots.items():
        random.shuffle(stack)
        while stack:
            v = stack.pop()
            order.append(v)
            freed: list[int] = []
            for x in ahead[v]:
                waiting[x] -= 1
                if not waiting[x]:
                    (freed if stages[x] == stage else roots[stages[x]]).append(x)
            random.shuffle(freed)
            stack += freed
    return order
