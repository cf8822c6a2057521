"""The load of the stage between every two down-sets of two pools, by matrix products over counts.

Let a < b be down-sets, p_a = 1 where a tensor's maker is in a, r_a the number of its readers in a, R the number of all.
The stage b - a sends the tensor where its maker is in b - a and a reader outside b, and receives it where the maker is
in a and a reader in b - a. Since a lies in b:

    sent     = sum over t of c_t (p_b [r_b < R] - p_a [r_b < R])
    received = sum over t of c_t (p_a - sum over v of (p_a [r_a = v]) [r_b = v])

Each term is a product of something of a and something of b, so all pairs are a few matrix products; tensors that do not
vary over one of the pools are a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import CostGraph, FloatArray, IntArray, Readers
from autopipe.partition.constraints import Rules
from autopipe.partition.graph.downsets import Pool
from autopipe.partition.memory.model import MemoryModel, MicrobatchBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """For each down-set of a pool and each of some tensors: whether its maker, and how many of its readers, are
    inside."""

    made: NDArray[np.float32]
    read: NDArray[np.float32]

    def part(self, columns: NDArray[np.bool_], rows: int | None = None) -> Counts:
        """Some of the tensors, for all or the first down-sets."""
        return Counts(made=self.made[:rows, columns], read=self.read[:rows, columns])


Direct = Callable[[Counts, Counts, NDArray[np.float32], FloatArray], FloatArray]


class Pairs:
    """Loads of all pairs of down-sets (a of A, b of B) of two neighbouring pools, as (A, B) arrays."""

    def __init__(self, graph: CostGraph, before: Pool, after: Pool) -> None:
        self.graph, self.before, self.after = graph, before, after
        nodes = np.union1d(before.universe, after.universe)
        self.nested: NDArray[np.bool_] = (before.members(nodes) @ (1 - after.members(nodes)).T) < 0.5
        self.equal = self.nested & (_sizes(before)[:, None] == _sizes(after)[None, :])
        moving = np.zeros(graph.num_nodes, bool)
        moving[nodes] = True
        varies = moving[graph.producer]
        varies[graph.tensor_readers.owner[moving[graph.tensor_readers.node]]] = True
        self.tensors, self.still = np.flatnonzero(varies), np.flatnonzero(~varies)
        readers = np.bincount(graph.tensor_readers.owner, minlength=len(varies)).astype(np.float32)
        self.full, self.full_still = readers[self.tensors], readers[self.still]
        self.a, self.still_a = _counts(graph, before, self.tensors), _base_counts(graph, before, self.still)
        self.b, self.still_b = _counts(graph, after, self.tensors), _base_counts(graph, after, self.still)
        self.vary_a, self.vary_b = _vary(self.a), _vary(self.b)

    def load_us(self) -> FloatArray:
        """Compute and exposed transfers; infinite where a is not inside b. An equal pair costs nothing."""
        graph = self.graph
        load: FloatArray = self.after.work[None, :] - self.before.work[:, None]
        if graph.exposed > 0:
            both = (graph.tensor_bytes + graph.gradient_bytes) * (graph.exposed / graph.link.bytes_per_us)
            load = load + self.sent(both) + self.received(both)
            latency = graph.exposed * graph.link.latency_us
            if latency > 0:
                for one in (np.ones(len(both)), (graph.gradient_bytes > 0).astype(float)):
                    for crossed in (self.sent(one), self.received(one)):
                        load = load + latency * (crossed > 0.5)
        return np.where(self.equal, 0.0, np.where(self.nested, load, np.inf))

    def sent(self, cost: FloatArray) -> FloatArray:
        """Sum of the costs of the tensors that leave the stage."""

        def direct(a: Counts, b: Counts, full: NDArray[np.float32], cost: FloatArray) -> FloatArray:
            return np.asarray(((b.made > a.made) & (b.read < full)) @ cost, np.float64)

        total, t, c = self._by_vectors(direct, cost)
        open_b = (self.b.read[:, t] < self.full[t]) * c
        fresh = (open_b * self.b.made[:, t]).sum(axis=1)[None, :]
        return np.asarray(total + fresh - self.a.made[:, t] @ open_b.T, np.float64)

    def received(self, cost: FloatArray) -> FloatArray:
        """Sum of the costs of the tensors that enter the stage."""

        def direct(a: Counts, b: Counts, full: NDArray[np.float32], cost: FloatArray) -> FloatArray:
            return np.asarray(((a.made > 0) & (b.read > a.read)) @ cost, np.float64)

        total, t, c = self._by_vectors(direct, cost)
        known = (self.a.made[:, t] @ c)[:, None]
        return np.asarray(
            total + known - _agreeing(self.a.read[:, t], self.b.read[:, t], self.a.made[:, t], c), np.float64
        )

    def _by_vectors(self, direct: Direct, cost: FloatArray) -> tuple[FloatArray, IntArray, FloatArray]:
        """The part of the tensors that do not vary over both pools: a number, a row and a column; and the tensors left
        over."""
        c = cost[self.tensors]
        over_b, over_a = ~self.vary_a, self.vary_a & ~self.vary_b
        still = direct(self.still_a, self.still_b, self.full_still, cost[self.still])
        row = direct(self.a.part(over_b, 1), self.b.part(over_b), self.full[over_b], c[over_b])
        column = direct(self.a.part(over_a), self.b.part(over_a, 1), self.full[over_a], c[over_a])
        left = np.flatnonzero(self.vary_a & self.vary_b)
        return np.asarray(still + row[None, :] + column[:, None], np.float64), left, c[left]

    def added_us(self, memory: MemoryModel, stage: int, num_stages: int, wanted: NDArray[np.bool_]) -> FloatArray:
        """Time of recompute of each wanted pair as stage k of K; infinite where it does not fit, 0 where it is not
        wanted."""
        graph = self.graph
        static = memory.static_bytes(graph)
        every = np.arange(len(static))
        a, b = (_read(graph.param_readers, pool, every) for pool in (self.before, self.after))
        held = static.sum() - _agreeing(a, b, np.ones_like(a), static)
        received, sent = self.received(graph.tensor_bytes), self.sent(graph.tensor_bytes)
        saved = self._difference(graph.saved_bytes)
        added = np.where(wanted, np.inf, 0.0)
        rows, cols = np.nonzero(wanted)
        in_flight = memory.in_flight(stage, num_stages)
        for option in graph.classes:
            if not len(rows):
                break
            micro = MicrobatchBytes(
                saved=self._difference(option.saved_bytes)[rows, cols],
                received=received[rows, cols],
                sent=sent[rows, cols],
                workspace=self._largest(option.workspace_bytes, rows, cols),
                kept=saved[rows, cols],
            )
            fits = memory.peak_bytes(option, held[rows, cols], micro, in_flight) <= memory.limit(stage)
            added[rows[fits], cols[fits]] = self._difference(option.recompute_us)[rows[fits], cols[fits]]
            rows, cols = rows[~fits], cols[~fits]
        return added

    def forbidden(self, rules: Rules, stage: int, num_stages: int) -> NDArray[np.bool_]:
        """Pairs that cannot be stage k of K."""
        wrong = np.zeros(self.nested.shape, bool)
        first = [pool.members(rules.first).min(axis=1, initial=1.0) < 0.5 for pool in (self.before, self.after)]
        last = [pool.members(rules.last).max(axis=1, initial=0.0) > 0.5 for pool in (self.before, self.after)]
        wrong |= first[1][None, :] if stage == 0 else first[0][:, None]
        wrong |= last[0][:, None] if stage == num_stages - 1 else last[1][None, :]
        several = _sizes(self.after)[None, :] - _sizes(self.before)[:, None] > 1.5
        for v in rules.alone:
            a, b = (pool.members(np.array([v]))[:, 0] > 0.5 for pool in (self.before, self.after))
            wrong |= ~a[:, None] & b[None, :] & several
        return wrong

    def _difference(self, values: FloatArray) -> FloatArray:
        """(A, B) sum of the values over b - a."""
        return np.asarray(_total(values, self.after)[None, :] - _total(values, self.before)[:, None], np.float64)

    def _largest(self, values: FloatArray, rows: IntArray, cols: IntArray) -> FloatArray:
        """The largest value over b - a, for some of the pairs."""
        largest, left = np.zeros(len(rows)), np.arange(len(rows))
        for level in np.unique(values[values > 0])[::-1]:
            if not len(left):
                break
            nodes = np.flatnonzero(values == level)
            a, b = (pool.members(nodes).sum(axis=1) for pool in (self.before, self.after))
            inside = b[cols[left]] > a[rows[left]]
            largest[left[inside]] = level
            left = left[~inside]
        return largest


def _total(values: FloatArray, pool: Pool) -> FloatArray:
    return np.asarray(values[pool.base].sum() + pool.bits @ values[pool.universe], np.float64)


def _sizes(pool: Pool) -> FloatArray:
    return np.asarray(pool.base.sum() + pool.bits.sum(axis=1), np.float64)


def _counts(graph: CostGraph, pool: Pool, tensors: IntArray) -> Counts:
    """Counts of some tensors over all down-sets of a pool."""
    return Counts(made=_made(graph.producer[tensors], pool), read=_read(graph.tensor_readers, pool, tensors))


def _made(makers: IntArray, pool: Pool) -> NDArray[np.float32]:
    nodes, column = np.unique(makers, return_inverse=True)
    return pool.members(nodes)[:, column]


def _base_counts(graph: CostGraph, pool: Pool, tensors: IntArray) -> Counts:
    """Counts of tensors that none of a pool's universe makes or reads, in its first down-set: (1, tensors)."""
    readers, size = graph.tensor_readers, len(graph.producer)
    read = np.bincount(readers.owner, weights=pool.base[readers.node], minlength=size)[tensors]
    made = pool.base[graph.producer[tensors]]
    return Counts(made=made[None, :].astype(np.float32), read=read[None, :].astype(np.float32))


def _read(readers: Readers, pool: Pool, things: IntArray) -> NDArray[np.float32]:
    """(N, things) how many readers are inside: those of the base, and those of the universe by a product with the
    incidence."""
    size = int(readers.owner.max(initial=-1)) + 1
    base = np.bincount(readers.owner, weights=pool.base[readers.node], minlength=size)[things]
    column = np.full(size, -1, np.int64)
    column[things] = np.arange(len(things))
    row = np.full(len(pool.base), -1, np.int64)
    row[pool.universe] = np.arange(len(pool.universe))
    use = (row[readers.node] >= 0) & (column[readers.owner] >= 0)
    incidence = np.zeros((len(pool.universe), len(things)), np.float32)
    np.add.at(incidence, (row[readers.node[use]], column[readers.owner[use]]), 1.0)
    return np.asarray(base[None, :] + pool.bits.astype(np.float32) @ incidence, np.float32)


def _vary(counts: Counts) -> NDArray[np.bool_]:
    return np.asarray((counts.made != counts.made[0]).any(axis=0) | (counts.read != counts.read[0]).any(axis=0))


def _agreeing(
    a: NDArray[np.float32], b: NDArray[np.float32], weight: NDArray[np.float32], cost: FloatArray
) -> FloatArray:
    """(A, B) sum of the costs of the columns where a and b count the same, weighted by (A, columns)."""
    total = np.zeros((len(a), len(b)))
    if not a.shape[1]:
        return total
    for value in range(int(a.max()) + 1):
        left, right = (a == value) & (weight > 0), b == value
        use = left.any(axis=0) & right.any(axis=0)
        if use.any():
            total += (left[:, use] * cost[use]) @ right[:, use].T.astype(float)
    return total
