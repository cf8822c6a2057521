"""The cost of every interval of a topological order, a block of intervals at a time.

The interval [i, j) of an order is a possible stage. What crosses its borders is a sum of rectangles in the (i, j)
plane: with p the position of a tensor's maker and x_1 < x_2 < … those of its readers, the tensor leaves the interval
where i <= p < j <= x_last, and enters it through x_m where x_(m-1) < i <= x_m < j (x_0 = p). A parameter is held, once
however many read it, where x_(m-1) < i <= x_m < j (x_0 = -1). So a block of intervals is a two-dimensional difference
array summed twice: O(rectangles + block) for any block, and never the whole n x n plane.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from autopipe.cost import CostGraph, FloatArray, IntArray, Readers
from autopipe.partition.constraints import Rules
from autopipe.partition.memory.interval_memory import IntervalMemory
from autopipe.partition.memory.model import MemoryModel

FORWARD, BACKWARD, TRAFFIC, RECEIVED, MESSAGE = 0, 1, 2, 3, 4
"""Weights of a tensor: exposed microseconds of its forward and of its gradient, bytes both ways, bytes forward, and
from MESSAGE on 1 for being sent at all, forward and back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangles:
    """Weighted rectangles first_row <= i <= last_row, first_col <= j <= last_col; `weights` is (kinds, rectangles)."""

    first_row: IntArray
    last_row: IntArray
    first_col: IntArray
    last_col: IntArray
    weights: FloatArray

    def on_grid(self, grid: IntArray) -> Rectangles:
        """The same rectangles in the indices of a coarser grid of positions; those that miss it are dropped."""
        bounds = (
            np.searchsorted(grid, self.first_row, "left"),
            np.searchsorted(grid, self.last_row, "right") - 1,
            np.searchsorted(grid, self.first_col, "left"),
            np.searchsorted(grid, self.last_col, "right") - 1,
        )
        keep = (bounds[0] <= bounds[1]) & (bounds[2] <= bounds[3])
        a, b, c, d = (bound[keep].astype(np.int64) for bound in bounds)
        return Rectangles(first_row=a, last_row=b, first_col=c, last_col=d, weights=self.weights[:, keep])

    def block(self, rows: tuple[int, int], cols: tuple[int, int], kinds: tuple[int, ...]) -> FloatArray:
        """Sum of the rectangles over rows[0] <= i <= rows[1] and cols[0] <= j <= cols[1], the kinds of weight added
        up."""
        height, width = rows[1] - rows[0] + 2, cols[1] - cols[0] + 2
        top, bottom = np.maximum(self.first_row, rows[0]), np.minimum(self.last_row, rows[1])
        left, right = np.maximum(self.first_col, cols[0]), np.minimum(self.last_col, cols[1])
        hit = (top <= bottom) & (left <= right)
        a, b = top[hit] - rows[0], bottom[hit] - rows[0] + 1
        c, d = left[hit] - cols[0], right[hit] - cols[0] + 1
        value = self.weights[kinds[0], hit]
        for kind in kinds[1:]:
            value = value + self.weights[kind, hit]
        corners = np.concatenate([a * width + c, b * width + d, b * width + c, a * width + d])
        signed = np.concatenate([value, value, -value, -value])
        sums = np.bincount(corners, weights=signed, minlength=height * width).reshape(height, width)
        return np.asarray(sums.cumsum(axis=0).cumsum(axis=1)[:-1, :-1], np.float64)


def entering(readers: Readers, before: IntArray, position: IntArray, end: int, weights: FloatArray) -> Rectangles:
    """Intervals that read a thing first: one rectangle for each reader.

    Args:
        before: for each thing, the position that counts as outside: its maker's, or -1.
        weights: (kinds, things).
    """
    at = position[readers.node]
    order = np.lexsort((at, readers.owner))
    owner, x = readers.owner[order], at[order]
    previous = np.empty_like(x)
    previous[1:] = x[:-1]
    first = np.ones(len(x), bool)
    first[1:] = owner[1:] != owner[:-1]
    previous[first] = before[owner[first]]
    last_col = np.full(len(x), end, np.int64)
    return Rectangles(first_row=previous + 1, last_row=x, first_col=x + 1, last_col=last_col, weights=weights[:, owner])


def leaving(graph: CostGraph, position: IntArray, weights: FloatArray) -> Rectangles:
    """Intervals that make a tensor which is read after them: one rectangle for each tensor."""
    made = position[graph.producer]
    last = made.copy()
    np.maximum.at(last, graph.tensor_readers.owner, position[graph.tensor_readers.node])
    return Rectangles(first_row=np.zeros_like(made), last_row=made, first_col=made + 1, last_col=last, weights=weights)


class IntervalCosts:
    """Costs of the intervals of one order, between the positions of a grid (all positions unless one is given).

    Attributes:
        order: (n) the nodes in this order.
        grid: positions 0 … n at which a cut may stand; rows and columns of a block are indices into it.
        work: prefix sums of the compute time at the grid's positions, in microseconds.
    """

    def __init__(
        self,
        graph: CostGraph,
        order: IntArray,
        memory: MemoryModel | None = None,
        grid: IntArray | None = None,
        rules: Rules | None = None,
    ) -> None:
        n = graph.num_nodes
        self.graph, self.order, self.memory, self.rules = graph, order, memory, rules or Rules()
        position = np.empty(n, np.int64)
        position[order] = np.arange(n)
        self._position = position
        scale = graph.exposed / graph.link.bytes_per_us
        forward, backward = graph.tensor_bytes, graph.gradient_bytes
        sent = [np.ones_like(forward), (backward > 0).astype(float)]
        weights = np.stack([forward * scale, backward * scale, forward + backward, forward, *sent])
        self._all_in = entering(graph.tensor_readers, position[graph.producer], position, n, weights)
        self._all_out = leaving(graph, position, weights)
        self._all_held: Rectangles | None = None
        if memory is not None and memory.constrains(graph):
            outside = np.full(len(graph.param_bytes), -1, np.int64)
            static = memory.static_bytes(graph)[None, :]
            self._all_held = entering(graph.param_readers, outside, position, n, static)
        self.use_grid(np.arange(n + 1) if grid is None else np.union1d(grid, self.rules.places(position)))

    def use_grid(self, grid: IntArray) -> None:
        """Restricts the cuts to these positions; 0 and n must be among them."""
        graph, whole = self.graph, len(grid) == self.graph.num_nodes + 1
        self.grid = grid
        self.forward = np.concatenate([[0.0], np.cumsum(graph.forward_us[self.order])])[grid]
        self.work = np.concatenate([[0.0], np.cumsum(graph.work_us[self.order])])[grid]
        self._in = self._all_in if whole else self._all_in.on_grid(grid)
        self._out = self._all_out if whole else self._all_out.on_grid(grid)
        if self._all_held is not None and self.memory is not None:
            self._held = self._all_held if whole else self._all_held.on_grid(grid)
            self._ways = IntervalMemory(graph, self.memory, self.order, grid)

    @property
    def num_positions(self) -> int:
        """Positions of the grid."""
        return len(self.grid)

    @property
    def choices(self) -> int:
        """Classes of recompute among which each interval constrains, 0 where memory is not counted."""
        return 0 if self._all_held is None else len(self.graph.classes)

    def exposed_us(self, rows: tuple[int, int], cols: tuple[int, int], kinds: tuple[int, ...]) -> FloatArray:
        """Exposed transfer time of a block of intervals, for `FORWARD`, `BACKWARD` or both.

        The latency is counted once for each side of a stage that anything crosses, as in `stage_costs`.
        """
        graph = self.graph
        if graph.exposed == 0.0:
            return np.zeros((rows[1] - rows[0] + 1, cols[1] - cols[0] + 1))
        total: FloatArray = self._in.block(rows, cols, kinds) + self._out.block(rows, cols, kinds)
        latency = graph.exposed * graph.link.latency_us
        if latency > 0:
            for side in (self._in, self._out):
                for kind in kinds:
                    total += latency * (side.block(rows, cols, (MESSAGE + kind,)) > 0.5)
        return np.asarray(total, np.float64)

    def load_us(self, rows: tuple[int, int], cols: tuple[int, int], speed: float = 1.0) -> FloatArray:
        """Compute, at this speed, and exposed transfers of a block of intervals; infinite where the interval is
        empty."""
        work: FloatArray = self.work[None, cols[0] : cols[1] + 1] - self.work[rows[0] : rows[1] + 1, None]
        load = work / speed + self.exposed_us(rows, cols, (FORWARD, BACKWARD))
        empty = np.arange(rows[0], rows[1] + 1)[:, None] >= np.arange(cols[0], cols[1] + 1)[None, :]
        load[empty] = np.inf
        return load

    def traffic_bytes(self, rows: tuple[int, int], cols: tuple[int, int]) -> FloatArray:
        """Bytes that a block of intervals receives forward and sends back as gradients."""
        return self._in.block(rows, cols, (TRAFFIC,))

    def stage_load_us(self, rows: tuple[int, int], cols: tuple[int, int], stage: int, num_stages: int) -> FloatArray:
        """The load of a block of intervals as stage k of K, recompute included; infinite where it does not fit or may
        not be."""
        speed = float(self.graph.speed(num_stages)[stage])
        load = self.load_us(rows, cols, speed)
        if self._all_held is not None:
            held = self._memory_blocks(rows, cols)
            load = load + self._ways.added_us(rows, cols, stage, num_stages, held, np.isfinite(load)) / speed
        if self.rules.any:
            start, end = self.grid[rows[0] : rows[1] + 1], self.grid[cols[0] : cols[1] + 1]
            load[self.rules.forbidden(self._position, start, end, stage, num_stages)] = np.inf
        return load

    def least_peak_bytes(self, rows: tuple[int, int], cols: tuple[int, int], stage: int, num_stages: int) -> FloatArray:
        """The least memory that a block of intervals needs as stage k of K, under any class of recompute."""
        assert self._all_held is not None, "without a limit no memory is counted"
        return self._ways.least_peak_bytes(rows, cols, stage, num_stages, self._memory_blocks(rows, cols))

    def _memory_blocks(self, rows: tuple[int, int], cols: tuple[int, int]) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Bytes of parameters and what is stored with them, bytes received, and bytes sent in the forward."""
        received, sent = (side.block(rows, cols, (RECEIVED,)) for side in (self._in, self._out))
        return self._held.block(rows, cols, (0,)), received, sent

    def stages(self, cuts: tuple[int, ...]) -> IntArray:
        """(n) the stage of each node, given the grid indices of the cuts between stages."""
        stage_of = np.empty(len(self.order), np.int64)
        bounds = [0, *(int(self.grid[c]) for c in cuts), len(self.order)]
        for k, (i, j) in enumerate(itertools.pairwise(bounds)):
            stage_of[self.order[i:j]] = k
        return stage_of
