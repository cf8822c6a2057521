"""The memory of the intervals of an order, and the class of recompute under which each fits into a stage.

For the interval [i, j) as stage k and a class c, with w = min(K - k, M) micro-batches in flight:

    peak_c = parameters + w (saved_c + received + sent) + buffers + largest workspace_c  [+ saved, where c is at once]

where `sent` counts only where something is computed again: else what is sent is among what is saved.

The first class with peak_c <= limit is taken: classes stand in the order of their time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import CostGraph, FloatArray, IntArray, RecomputeOption
from autopipe.partition.memory.model import MemoryModel

Block = tuple[int, int]
Bytes = tuple[FloatArray, FloatArray, FloatArray]
"""Bytes of parameters and what is stored with them, bytes received and bytes sent, of a block of intervals."""


class IntervalMemory:
    """What intervals between the positions of a grid need, under each class of a graph."""

    def __init__(self, graph: CostGraph, memory: MemoryModel, order: IntArray, grid: IntArray) -> None:
        self.memory = memory
        self._saved = _prefix(graph.saved_bytes, order, grid)
        self._ways = [_Way(way, order, grid) for way in graph.classes]

    def added_us(
        self, rows: Block, cols: Block, stage: int, num_stages: int, held: Bytes, wanted: NDArray[np.bool_]
    ) -> FloatArray:
        """Time of recompute of each wanted interval as stage k of K; infinite where it does not fit, 0 where it is not wanted."""
        added = np.where(wanted, np.inf, 0.0)
        row, col = np.nonzero(wanted)
        for way in self._ways:
            if not len(row):
                break
            i, j = row + rows[0], col + cols[0]
            need = self._peak_bytes(way, i, j, stage, num_stages, tuple(part[row, col] for part in held))
            fits = need <= self.memory.limit(stage)
            added[row[fits], col[fits]] = way.again[j[fits]] - way.again[i[fits]]
            row, col = row[~fits], col[~fits]
        return added

    def least_peak_bytes(self, rows: Block, cols: Block, stage: int, num_stages: int, held: Bytes) -> FloatArray:
        """The least that each interval of a block needs as stage k of K; of an empty one, its value means nothing."""
        row, col = np.indices(held[0].shape).reshape(2, -1)
        i, j = row + rows[0], col + cols[0]
        parts = tuple(part.reshape(-1) for part in held)
        peaks = [self._peak_bytes(way, i, j, stage, num_stages, parts) for way in self._ways]
        return np.asarray(np.min(peaks, axis=0).reshape(held[0].shape), np.float64)

    def _peak_bytes(
        self, way: _Way, i: IntArray, j: IntArray, stage: int, num_stages: int, held: tuple[FloatArray, ...]
    ) -> FloatArray:
        static, received, sent = held
        activations = way.saved[j] - way.saved[i] + received + (0.0 if way.is_none else sent)
        need = static + self.memory.in_flight(stage, num_stages) * activations
        need = need + way.largest_workspace(i, j) + self.memory.buffer_bytes(received, sent)
        return np.asarray(need + (self._saved[j] - self._saved[i] if way.at_once else 0.0), np.float64)


class _Way:
    """One class along an order: prefix sums, and the largest workspace of 1, 2, 4, … spans of the grid."""

    def __init__(self, way: RecomputeOption, order: IntArray, grid: IntArray) -> None:
        self.is_none, self.at_once = way.is_none, way.at_once
        self.saved, self.again = _prefix(way.saved_bytes, order, grid), _prefix(way.recompute_us, order, grid)
        self._spans = np.maximum.reduceat(way.workspace_bytes[order], grid[:-1])
        self._table: FloatArray | None = None

    def largest_workspace(self, i: IntArray, j: IntArray) -> FloatArray:
        """Of each interval, 0 where it is empty: two overlapping runs of spans whose length is a power of two cover it."""
        if self._table is None:
            self._table = _powers_of_two(self._spans)
        level = np.frexp(np.maximum(j - i, 1).astype(float))[1] - 1
        last = np.maximum(j - (1 << level), 0)
        found = np.maximum(self._table[level, np.minimum(i, len(self._spans) - 1)], self._table[level, last])
        return np.where(j > i, found, 0.0)


def _powers_of_two(values: FloatArray) -> FloatArray:
    """(levels, n) in row l the largest of the 2^l values from each one on."""
    rows, half = [values], 1
    while 2 * half <= len(values):
        last = rows[-1].copy()
        np.maximum(last[:-half], rows[-1][half:], out=last[:-half])
        rows.append(last)
        half *= 2
    return np.stack(rows)


def _prefix(values: FloatArray, order: IntArray, grid: IntArray) -> FloatArray:
    return np.asarray(np.concatenate([[0.0], np.cumsum(values[order])])[grid], np.float64)
