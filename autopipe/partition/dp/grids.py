"""Positions of a long order that a cut may stand at: few enough for the interval DP, and the cheap ones among them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import CostGraph, FloatArray, IntArray


def live_bytes(graph: CostGraph, order: IntArray) -> FloatArray:
    """(n + 1) bytes of the tensors that cross each position of an order."""
    n = graph.num_nodes
    position = np.empty(n, np.int64)
    position[order] = np.arange(n)
    made = position[graph.producer]
    last = made.copy()
    np.maximum.at(last, graph.tensor_readers.owner, position[graph.tensor_readers.node])
    change = np.zeros(n + 2)
    np.add.at(change, made + 1, graph.tensor_bytes)
    np.add.at(change, last + 1, -graph.tensor_bytes)
    return change.cumsum()[: n + 1]


def grid(
    graph: CostGraph, order: IntArray, size: int, *, around: IntArray | None = None, band_us: float = 0.0
) -> IntArray:
    """About `size` positions, 0 and n among them: in each of as many equal spans of work, the one with the least
    traffic.

    Args:
        around: positions of cuts that stay in the grid; with a band, only what lies within this much work of one of
            them.
    """
    n = graph.num_nodes
    if n < size:
        return np.arange(n + 1)
    work = np.concatenate([[0.0], np.cumsum(graph.work_us[order])])
    kept = np.zeros(0, np.int64) if around is None else around
    allowed = np.ones(n + 1, bool)
    if around is not None and band_us > 0:
        allowed = _near(work, work[around], band_us)
    candidates = np.flatnonzero(allowed)
    if len(candidates) > size:
        span = max(_covered(work, candidates) / size, 1e-30)
        bucket = np.floor(work[candidates] / span)
        ranked = np.lexsort((candidates, live_bytes(graph, order)[candidates], bucket))
        first = np.ones(len(ranked), bool)
        first[1:] = np.diff(bucket[ranked]) > 0
        candidates = candidates[ranked[first]]
    spread = np.linspace(0, n, size // 8 + 2).astype(np.int64)
    return np.unique(np.concatenate([[0, n], spread, candidates, kept]))


def _near(work: FloatArray, centres: FloatArray, band_us: float) -> NDArray[np.bool_]:
    near = np.zeros(len(work), bool)
    for centre in centres:
        near[np.searchsorted(work, centre - band_us, "left") : np.searchsorted(work, centre + band_us, "right")] = True
    return near


def _covered(work: FloatArray, candidates: IntArray) -> float:
    """Work between neighbouring candidates that are neighbours in the order too."""
    steps = np.diff(candidates) == 1
    return float(np.diff(work[candidates])[steps].sum())
