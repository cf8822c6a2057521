"""The memory of the intervals of an order, and the option of recompute under which each fits into a stage.

The first option whose peak (`MemoryModel.peak_bytes`) is within the limit is taken: options stand in the order of their
time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import CostGraph, FloatArray, IntArray, RecomputeOption
from autopipe.partition.memory.model import MemoryModel, MicrobatchBytes

Block = tuple[int, int]
Bytes = tuple[FloatArray, FloatArray, FloatArray]
"""Bytes of parameters and what is stored with them, bytes received and bytes sent, of a block of intervals."""


class IntervalMemory:
    """Memory of the intervals between the positions of a grid, under each option of a graph."""

    def __init__(self, graph: CostGraph, memory: MemoryModel, order: IntArray, grid: IntArray) -> None:
        self.memory = memory
        self._saved = _prefix(graph.saved_bytes, order, grid)
        self._options = [_Option(option, order, grid) for option in graph.classes]

    def added_us(
        self, rows: Block, cols: Block, stage: int, num_stages: int, held: Bytes, wanted: NDArray[np.bool_]
    ) -> FloatArray:
        """Time of recompute of each wanted interval as stage k of K; infinite where it does not fit, 0 where it is not
        wanted."""
        added = np.where(wanted, np.inf, 0.0)
        row, col = np.nonzero(wanted)
        for option in self._options:
            if not len(row):
                break
            i, j = row + rows[0], col + cols[0]
            need = self._peak_bytes(option, i, j, stage, num_stages, tuple(part[row, col] for part in held))
            fits = need <= self.memory.limit(stage)
            added[row[fits], col[fits]] = option.again[j[fits]] - option.again[i[fits]]
            row, col = row[~fits], col[~fits]
        return added

    def least_peak_bytes(self, rows: Block, cols: Block, stage: int, num_stages: int, held: Bytes) -> FloatArray:
        """The least that each interval of a block needs as stage k of K; of an empty one, its value means nothing."""
        row, col = np.indices(held[0].shape).reshape(2, -1)
        i, j = row + rows[0], col + cols[0]
        parts = tuple(part.reshape(-1) for part in held)
        peaks = [self._peak_bytes(option, i, j, stage, num_stages, parts) for option in self._options]
        return np.asarray(np.min(peaks, axis=0).reshape(held[0].shape), np.float64)

    def _peak_bytes(
        self, option: _Option, i: IntArray, j: IntArray, stage: int, num_stages: int, held: tuple[FloatArray, ...]
    ) -> FloatArray:
        static, received, sent = held
        micro = MicrobatchBytes(
            saved=option.saved[j] - option.saved[i],
            received=received,
            sent=sent,
            workspace=option.largest_workspace(i, j),
            kept=self._saved[j] - self._saved[i],
        )
        return self.memory.peak_bytes(option.recompute, static, micro, self.memory.in_flight(stage, num_stages))


class _Option:
    """One option along an order: prefix sums, and the largest workspace of 1, 2, 4, … spans of the grid."""

    def __init__(self, option: RecomputeOption, order: IntArray, grid: IntArray) -> None:
        self.recompute = option
        self.saved, self.again = _prefix(option.saved_bytes, order, grid), _prefix(option.recompute_us, order, grid)
        self._spans = np.maximum.reduceat(option.workspace_bytes[order], grid[:-1])
        self._table: FloatArray | None = None

    def largest_workspace(self, i: IntArray, j: IntArray) -> FloatArray:
        """Of each interval, 0 where it is empty: two overlapping runs of spans whose length is a power of two cover
        it."""
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
