"""The interval dynamic program: the best split of one topological order into exactly K stages.

With t_k(i, j) the load of the interval [i, j) as stage k, compute and exposed transfers, infinite where it does not
fit:

    F_k[j] = min over i < j of max(F_(k-1)[i], t_k(i, j))        the least possible largest load
    G_k[j] = min over i < j with t_k(i, j) <= F_K[n] of G_(k-1)[i] + c(i, j)      then the least traffic at that load

It is PipeDream's recurrence (Narayanan et al., SOSP 2019, without replication) with the transfers of a DAG
instead of a chain. Positions that no split below an upper bound can use are dropped before they are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import FloatArray, IntArray
from autopipe.partition.dp.intervals import IntervalCosts
from autopipe.partition.effort import Effort

TOLERANCE = 1e-9
"""Relative difference below which two loads are the same: sums in another order differ in their last bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A split of one order: its largest load, and the grid indices of its K - 1 cuts."""

    load_us: float
    cuts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBlock:
    """The intervals that may become stage k: loads for start positions rows and end positions cols."""

    rows: tuple[int, int]
    cols: tuple[int, int]
    load_us: FloatArray


def best_split(costs: IntervalCosts, num_stages: int, upper_us: float, effort: Effort) -> Split | None:
    """The split with the least largest load, among these one with the least traffic; None where none is below
    `upper_us`."""
    blocks = stage_blocks(costs, num_stages, upper_us, effort)
    if blocks is None:
        return None
    least = np.zeros(1)
    for block in blocks:
        least = np.maximum(least[:, None], block.load_us).min(axis=0)
    return least_traffic(costs, blocks, float(least[-1]))


def least_traffic(costs: IntervalCosts, blocks: list[StageBlock], load_us: float) -> Split | None:
    """The split with the least traffic among those whose loads stay below `load_us`."""
    total, arrows = np.zeros(1), []
    for block in blocks:
        traffic = np.where(
            block.load_us <= load_us * (1 + TOLERANCE), costs.traffic_bytes(block.rows, block.cols), np.inf
        )
        through = total[:, None] + traffic
        best = through.argmin(axis=0)
        total = through[best, np.arange(len(best))]
        arrows.append(best)
    if not np.isfinite(total[-1]):
        return None
    return Split(load_us=load_us, cuts=trace_back(blocks, arrows))


def trace_back(blocks: list[StageBlock], arrows: list[IntArray]) -> tuple[int, ...]:
    """The cuts, from the best predecessor (a row) of each end position (a column) of each stage."""
    position = blocks[-1].cols[1]
    cuts = []
    for block, best in zip(reversed(blocks), reversed(arrows), strict=True):
        position = block.rows[0] + int(best[position - block.cols[0]])
        cuts.append(position)
    return tuple(reversed(cuts[:-1]))


def stage_blocks(costs: IntervalCosts, num_stages: int, upper_us: float, effort: Effort) -> list[StageBlock] | None:
    """For each stage, the intervals that a split whose loads are at most `upper_us` can use; None where there is
    none."""
    work, last, K = costs.work, costs.num_positions - 1, num_stages
    slack = upper_us * (1 + TOLERANCE) + TOLERANCE * float(work[-1])
    most = slack * costs.graph.speed(K)  # work that a stage can do within the bound
    after = np.append(most[::-1].cumsum()[::-1], 0.0)
    rows, blocks = (0, 0), []
    reachable: NDArray[np.bool_] = np.ones(1, bool)
    for k in range(K):
        first = max(rows[0] + 1, int(np.searchsorted(work, work[-1] - after[k + 1], "left")))
        end = min(last - (K - 1 - k), int(np.searchsorted(work, work[rows[1]] + most[k], "right")) - 1)
        if k == K - 1:
            first, end = last, last if end == last else last - 1
        if first > end:
            return None
        load = costs.stage_load_us(rows, (first, end), k, K)
        effort.spend(cells=load.size * (1 + 0.3 * costs.choices) + 4e3 * (1 + costs.choices))
        load[load > slack] = np.inf
        load[~reachable] = np.inf
        reached = np.flatnonzero(np.isfinite(load).any(axis=0))
        if not len(reached):
            return None
        lo, hi = int(reached[0]), int(reached[-1])
        cols = (first + lo, first + hi)
        blocks.append(StageBlock(rows=rows, cols=cols, load_us=load[:, lo : hi + 1]))
        reachable = np.asarray(np.isfinite(blocks[-1].load_us).any(axis=0))
        rows = cols
    return blocks
