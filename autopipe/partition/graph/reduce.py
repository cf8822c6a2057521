"""Lossless reduction: nodes without work that some best split keeps beside a neighbour are merged with it.

With w the work of a node v and c(v) the bytes of its output, and of its gradient, v may join

    its only neighbour      if w = 0: one transfer less, and the order of stages still holds;
    its only predecessor u  if w = 0, u is read by v alone and c(v) <= c(u): c(v) crosses instead of c(u);
    its only reader x       if w = 0, v has one predecessor u and c(u) <= c(v): c(u) crosses instead of c(v).

No largest load gets worse by such a move, so the least largest load of the merged graph, empty stages allowed, is a
lower bound for the graph itself. A move can need more memory; under a limit only nodes that hold nothing are merged.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from autopipe.cost import CostGraph, FloatArray, IntArray, Readers, sum_by
from autopipe.partition.graph.orders import by_priority


def reduced(graph: CostGraph, *, limited: bool) -> tuple[CostGraph, IntArray]:
    """The merged graph, and (n) the node of it that stands for each node of the graph."""
    merge = _Merge(graph, limited)
    merge.run()
    root = np.array([merge.find(v) for v in range(graph.num_nodes)])
    kept, index = np.unique(root, return_inverse=True)
    if len(kept) == graph.num_nodes:
        return graph, np.arange(graph.num_nodes)
    return _merged(graph, index.astype(np.int64), len(kept))


class _Merge:
    """Union-find over nodes, with the neighbours of each merged node kept up to date."""

    def __init__(self, graph: CostGraph, limited: bool) -> None:
        n = graph.num_nodes
        self.parent = list(range(n))
        self.before = [set(nodes) for nodes in graph.predecessors]
        self.after = [set(nodes) for nodes in graph.successors]
        self.idle = (graph.work_us == 0).tolist()
        if limited:
            holds = np.any([(c.saved_bytes > 0) | (c.workspace_bytes > 0) for c in graph.classes], axis=0)
            holds[graph.param_readers.node] = True
            self.idle = (np.array(self.idle) & ~holds).tolist()
        self.bytes = list(zip(graph.tensor_bytes.tolist(), graph.gradient_bytes.tolist(), strict=True))
        self.readers: list[list[int]] = [[] for _ in self.bytes]
        for t, v in zip(graph.tensor_readers.owner.tolist(), graph.tensor_readers.node.tolist(), strict=True):
            self.readers[t].append(v)
        self.made: list[list[int]] = [[] for _ in range(n)]
        for t, v in enumerate(graph.producer.tolist()):
            self.made[v].append(t)

    def find(self, v: int) -> int:
        while self.parent[v] != v:
            self.parent[v] = self.parent[self.parent[v]]
            v = self.parent[v]
        return v

    def run(self) -> None:
        waiting = list(range(len(self.parent)))
        while waiting:
            v = waiting.pop()
            if self.parent[v] != v:
                continue
            target = self._target(v)
            if target is not None:
                waiting += [target, *self._join(v, target)]

    def _target(self, v: int) -> int | None:
        if not self.idle[v]:
            return None
        before, after = self.before[v], self.after[v]
        if len(before) + len(after) == 1:
            return next(iter(before or after))
        if len(before) != 1:
            return None
        u = next(iter(before))
        handed = self._sent(u, {v})
        passed_on = self._sent(v, after)
        if len(self.after[u]) == 1 and _at_most(passed_on, handed):
            return u
        if len(after) == 1 and _at_most(handed, passed_on):
            return next(iter(after))
        return None

    def _sent(self, v: int, targets: set[int]) -> tuple[float, float]:
        """Bytes, and bytes of gradients, of what v hands to these nodes, each tensor once."""
        sent = [t for t in self.made[v] if any(self.find(r) in targets for r in self.readers[t])]
        return sum(self.bytes[t][0] for t in sent), sum(self.bytes[t][1] for t in sent)

    def _join(self, v: int, target: int) -> list[int]:
        """Merges v into a neighbour and names the nodes whose neighbours have changed.

        v has one neighbour, or one predecessor: no path leads from v to its reader or from its predecessor to v but the
        edge itself, or v's only reader joins it; so no cycle can arise.
        """
        before, after = self.before[v] - {target}, self.after[v] - {target}
        for u in self.before[v]:
            self.after[u].discard(v)
        for x in self.after[v]:
            self.before[x].discard(v)
        self.made[target] += self.made[v]
        for u in before:
            self.after[u].add(target)
            self.before[target].add(u)
        for x in after:
            self.before[x].add(target)
            self.after[target].add(x)
        self.idle[target] = self.idle[target] and self.idle[v]
        self.parent[v] = target
        return [*before, *after]


def _at_most(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1]


def _merged(graph: CostGraph, index: IntArray, size: int) -> tuple[CostGraph, IntArray]:
    """The quotient graph, numbered in topological order again."""
    edges = {(int(index[u]), int(index[v])) for v, nodes in enumerate(graph.predecessors) for u in nodes}
    edges = {(u, v) for u, v in edges if u != v}
    number = _topological(edges, size)
    index = number[index]
    before: list[list[int]] = [[] for _ in range(size)]
    after: list[list[int]] = [[] for _ in range(size)]
    for u, v in sorted((int(number[u]), int(number[v])) for u, v in edges):
        after[u].append(v)
        before[v].append(u)

    def largest(values: FloatArray) -> FloatArray:
        found = np.zeros(size)
        np.maximum.at(found, index, values)
        return found

    classes = tuple(
        dataclasses.replace(
            c,
            saved_bytes=sum_by(index, c.saved_bytes, size),
            workspace_bytes=largest(c.workspace_bytes),
            recompute_us=sum_by(index, c.recompute_us, size),
        )
        for c in graph.classes
    )
    members: list[list[int]] = [[] for _ in range(size)]
    for v, own in enumerate(graph.members):
        members[index[v]] += own
    producer, names, tensor_bytes, gradient_bytes, readers = _tensors(graph, index)
    held = np.unique(graph.param_readers.owner * size + index[graph.param_readers.node])
    merged = dataclasses.replace(
        graph,
        members=tuple(tuple(sorted(own)) for own in members),
        forward_us=sum_by(index, graph.forward_us, size),
        backward_us=sum_by(index, graph.backward_us, size),
        saved_bytes=sum_by(index, graph.saved_bytes, size),
        workspace_bytes=largest(graph.workspace_bytes),
        predecessors=tuple(map(tuple, before)),
        successors=tuple(map(tuple, after)),
        tensor_names=names,
        producer=producer,
        tensor_bytes=tensor_bytes,
        gradient_bytes=gradient_bytes,
        tensor_readers=readers,
        param_readers=Readers(owner=held // size, node=held % size),
        classes=classes,
    )
    return merged, index


def _topological(edges: set[tuple[int, int]], size: int) -> IntArray:
    ahead: list[list[int]] = [[] for _ in range(size)]
    back: list[list[int]] = [[] for _ in range(size)]
    for u, v in edges:
        ahead[u].append(v)
        back[v].append(u)
    number = np.empty(size, np.int64)
    number[by_priority(ahead, back, list(range(size)))] = np.arange(size)
    return number


def _tensors(
    graph: CostGraph, index: IntArray
) -> tuple[IntArray, tuple[tuple[int, ...], ...], FloatArray, FloatArray, Readers]:
    """Tensors that still leave their node; those with the same maker and readers become one."""
    readers: list[set[int]] = [set() for _ in graph.producer]
    made = index[graph.producer].tolist()
    for t, v in zip(graph.tensor_readers.owner.tolist(), index[graph.tensor_readers.node].tolist(), strict=True):
        if v != made[t]:
            readers[t].add(v)
    alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for t, nodes in enumerate(readers):
        if nodes:
            alike.setdefault((made[t], tuple(sorted(nodes))), []).append(t)
    return (
        np.array([maker for maker, _ in alike], np.int64),
        tuple(tuple(sorted(i for t in same for i in graph.tensor_names[t])) for same in alike.values()),
        np.array([sum(graph.tensor_bytes[t] for t in same) for same in alike.values()], float),
        np.array([sum(graph.gradient_bytes[t] for t in same) for same in alike.values()], float),
        Readers(
            owner=np.repeat(np.arange(len(alike)), [len(nodes) for _, nodes in alike]).astype(np.int64),
            node=np.array([v for _, nodes in alike for v in nodes], np.int64),
        ),
    )
