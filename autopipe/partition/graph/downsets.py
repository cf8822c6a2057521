"""Down-sets of a graph: the sets of nodes that contain all their predecessors, each a possible border between two
stages.

A split into K stages is a chain of down-sets D_0 = {} < D_1 < … < D_K = all. If no stage may be busy for longer than U,
then the work of D_k lies between W - (K - k) U and k U. The down-sets of such a window are found by adding and removing
one node at a time, those with the least traffic first. Any two of them are joined by such moves between the window
widened by the largest node: from D towards E, add a minimal node of E - D while the work is not above the window, else
remove a maximal node of D - E. So where the search runs dry before its limit, it has found them all.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import CostGraph, FloatArray, IntArray

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Down-sets that agree outside a few nodes.

    Attributes:
        base: (n) membership of the nodes that are in all of them.
        universe: (u) the nodes that are in some and not in others.
        bits: (N, u) membership of the universe in each down-set.
        work: (N) work of each.
        complete: every down-set of the window is among them.
    """

    base: BoolArray
    universe: IntArray
    bits: NDArray[np.uint8]
    work: FloatArray
    complete: bool

    def members(self, nodes: IntArray) -> NDArray[np.float32]:
        """(N, nodes) membership of some nodes, as 0 and 1."""
        rows = np.repeat(self.base[nodes].astype(np.float32)[None, :], len(self.work), axis=0)
        where = np.full(len(self.base), -1, np.int64)
        where[nodes] = np.arange(len(nodes))
        column = where[self.universe]
        rows[:, column[column >= 0]] = self.bits[:, column >= 0]
        return rows

    def whole(self, index: int) -> BoolArray:
        """(n) membership in one of the down-sets."""
        members = self.base.copy()
        members[self.universe] = self.bits[index] > 0
        return members


class Lattice:
    """The down-sets of one graph; what every window needs is computed once."""

    def __init__(self, graph: CostGraph) -> None:
        self.graph = graph
        self.work = graph.work_us
        self.total = float(self.work.sum())
        below = _ancestors(graph)
        self.work_up_to = below @ self.work
        self.work_from = self.work @ below
        scale = graph.exposed / graph.link.bytes_per_us
        both = graph.tensor_bytes + graph.gradient_bytes
        self.crossing = both * scale if scale > 0 else both
        n = graph.num_nodes
        self.made: list[list[int]] = [[] for _ in range(n)]
        self.read: list[list[int]] = [[] for _ in range(n)]
        self.readers: list[list[int]] = [[] for _ in graph.producer]
        for t, v in enumerate(graph.producer.tolist()):
            self.made[v].append(t)
        for t, v in zip(graph.tensor_readers.owner.tolist(), graph.tensor_readers.node.tolist(), strict=True):
            self.read[v].append(t)
            self.readers[t].append(v)

    def single(self, members: BoolArray) -> Pool:
        """A pool of one down-set that is certain: nothing, or everything."""
        return Pool(
            base=members.copy(),
            universe=np.zeros(0, np.int64),
            bits=np.zeros((1, 0), np.uint8),
            work=np.array([float(self.work[members].sum())]),
            complete=True,
        )

    def window(
        self, seeds: BoolArray, low: float, high: float, limit: int, noise: float, random: Random, *, local: bool
    ) -> Pool:
        """Down-sets with work from `low` to `high`, reached from the seeds (S, n), at most `limit` of them.

        Args:
            noise: how far the order of search strays from least traffic first.
            local: only nodes on which the seeds differ are moved; nothing is complete then.
        """
        eps = 1e-9 * self.total
        must = self.total - self.work_from < low - eps
        never = self.work_up_to > high + eps
        base, free = must.copy(), ~must & ~never
        if local:
            base |= seeds.all(axis=0)
            free &= seeds.any(axis=0) & ~base
        universe = np.flatnonzero(free)
        slack = 0.0 if local or not len(universe) else float(self.work[universe].max())
        walk = _Walk(self, base, universe)
        bounds = (low - eps, high + eps)
        found, dry = walk.run(seeds, bounds, slack, limit, noise, random)
        size = len(universe)
        width = (size + 7) // 8
        packed = b"".join(mask.to_bytes(width, "little") for mask, _ in found)
        octets = np.frombuffer(packed, np.uint8).reshape(len(found), width)
        bits = (
            np.unpackbits(octets, axis=1, bitorder="little")[:, :size] if width else np.zeros((len(found), 0), np.uint8)
        )
        work = np.array([w for _, w in found])
        return Pool(base=base, universe=universe, bits=bits, work=work, complete=dry and not local)


def _ancestors(graph: CostGraph) -> NDArray[np.float32]:
    """(n, n) row v marks v and everything before it."""
    masks: list[int] = []
    for v, before in enumerate(graph.predecessors):
        mask = 1 << v
        for u in before:
            mask |= masks[u]
        masks.append(mask)
    n = graph.num_nodes
    width = (n + 7) // 8
    packed = np.frombuffer(b"".join(mask.to_bytes(width, "little") for mask in masks), np.uint8).reshape(n, width)
    return np.unpackbits(packed, axis=1, bitorder="little")[:, :n].astype(np.float32)


class _Walk:
    """Best-first search over the down-sets between `base` and `base` with the universe; sets are bit masks of the
    universe."""

    def __init__(self, lattice: Lattice, base: BoolArray, universe: IntArray) -> None:
        graph = lattice.graph
        bit = {v: 1 << i for i, v in enumerate(universe.tolist())}
        self.nodes = universe.tolist()
        self.base_work = float(lattice.work[base].sum())
        self.work = [float(lattice.work[v]) for v in self.nodes]
        self.before = [sum(bit[u] for u in graph.predecessors[v] if u in bit) for v in self.nodes]
        self.after = [sum(bit[x] for x in graph.successors[v] if x in bit) for v in self.nodes]
        cost = lattice.crossing.tolist()
        self.opens = [sum(cost[t] for t in lattice.made[v]) for v in self.nodes]
        self.closes: list[list[tuple[float, int]]] = []
        for v in self.nodes:
            inside = [t for t in lattice.read[v] if all(r in bit or base[r] for r in lattice.readers[t])]
            self.closes.append([(cost[t], sum(bit[r] for r in lattice.readers[t] if r in bit)) for t in inside])

    def run(
        self, seeds: BoolArray, bounds: tuple[float, float], slack: float, limit: int, noise: float, random: Random
    ) -> tuple[list[tuple[int, float]], bool]:
        """Masks and works found in the window, and whether the search ran dry."""
        low, high = bounds
        seen: set[int] = set()
        heap: list[tuple[float, int, float, float, int, int]] = []
        for members, work in self._starts(seeds):
            if members not in seen and low - slack <= work <= high + slack:
                seen.add(members)
                heap.append((0.0, members, work, 0.0, *self._frontier(members)))
        heapq.heapify(heap)
        found: list[tuple[int, float]] = []
        room = 4 * limit
        while heap and len(found) < limit:
            _, members, work, traffic, ready, last = heapq.heappop(heap)
            if low <= work <= high:
                found.append((members, work))
            for i in _bits(ready):
                grown, total = members | 1 << i, work + self.work[i]
                if grown not in seen and total <= high + slack and len(seen) < room:
                    seen.add(grown)
                    cost = traffic + self.opens[i] - sum(c for c, readers in self.closes[i] if not readers & ~grown)
                    more = self._after_adding(i, grown, ready, last)
                    heapq.heappush(heap, (cost * (1 + noise * random.random()), grown, total, cost, *more))
            for i in _bits(last):
                shrunk, total = members & ~(1 << i), work - self.work[i]
                if shrunk not in seen and total >= low - slack and len(seen) < room:
                    seen.add(shrunk)
                    cost = traffic - self.opens[i] + sum(c for c, readers in self.closes[i] if not readers & ~members)
                    less = self._after_removing(i, shrunk, ready, last)
                    heapq.heappush(heap, (cost * (1 + noise * random.random()), shrunk, total, cost, *less))
        return found, not heap and len(seen) < room

    def _starts(self, seeds: BoolArray) -> Iterator[tuple[int, float]]:
        for row in seeds[:, np.array(self.nodes, np.int64)]:
            mask = int.from_bytes(np.packbits(row, bitorder="little").tobytes(), "little")
            yield mask, self.base_work + float(np.dot(row, self.work))

    def _frontier(self, members: int) -> tuple[int, int]:
        """Nodes that can be added, and nodes that can be removed."""
        ready = last = 0
        for i in range(len(self.nodes)):
            if members >> i & 1:
                last |= 0 if self.after[i] & members else 1 << i
            else:
                ready |= 0 if self.before[i] & ~members else 1 << i
        return ready, last

    def _after_adding(self, i: int, members: int, ready: int, last: int) -> tuple[int, int]:
        ready &= ~(1 << i)
        for x in _bits(self.after[i]):
            if not self.before[x] & ~members:
                ready |= 1 << x
        return ready, (last & ~self.before[i]) | 1 << i

    def _after_removing(self, i: int, members: int, ready: int, last: int) -> tuple[int, int]:
        last &= ~(1 << i)
        for u in _bits(self.before[i]):
            if not self.after[u] & members:
                last |= 1 << u
        return (ready & ~self.after[i]) | 1 << i, last


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
