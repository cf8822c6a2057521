"""The interval DP for the time of a step: the critical-path bound H of 1F1B in place of the largest load.

For stage q of K with M micro-batches, f, b its forward and backward time, t = f + b, S the round trip before it, R that
after it, links included, w = K - q (autopipe/simulate/bound.py):

    H_q = S + max{ M t,  f + R + M b,  M f + R + b,  [M > w] (M - w + 1) t + 2 R }
    F_k[j] = min over i < j of max(F_(k-1)[i], H_k(i, j))

S is carried along the best split of each prefix, and R is what then remains of a total that the caller estimates, so
the DP is near-exact, not exact: the simulator has the last word.
"""

from __future__ import annotations

import numpy as np

from autopipe.cost import FloatArray, IntArray
from autopipe.partition.dp.interval_dp import TOLERANCE, StageBlock, stage_blocks, trace_back
from autopipe.partition.dp.intervals import FORWARD, IntervalCosts
from autopipe.partition.effort import Effort


def least_step_cuts(
    costs: IntervalCosts, num_stages: int, num_microbatches: int, upper_us: float, round_trip_us: float, effort: Effort
) -> tuple[int, ...] | None:
    """Grid indices of the cuts of the split with the least H; None where none is below `upper_us`.

    Args:
        round_trip_us: estimate of what one micro-batch takes through all stages and links and back.
    """
    blocks = stage_blocks(costs, num_stages, upper_us / num_microbatches, effort)
    if blocks is None:
        return None
    least, before = np.zeros(1), np.zeros(1)
    arrows: list[IntArray] = []
    for k, block in enumerate(blocks):
        effort.spend(cells=2 * block.load_us.size)
        hop = _hop_us(costs, block) if k else np.zeros_like(block.load_us)
        reached = before[:, None] + hop
        speed = float(costs.graph.speed(num_stages)[k])
        bound = _critical_path_us(costs, block, reached, round_trip_us, num_stages - k, num_microbatches, speed)
        bound = np.where(bound <= upper_us * (1 + TOLERANCE), bound, np.inf)
        through = np.maximum(least[:, None], bound)
        best = through.argmin(axis=0)
        columns = np.arange(len(best))
        least = through[best, columns]
        load = np.where(np.isfinite(block.load_us), block.load_us, 0.0)
        before = (reached + load)[best, columns]
        arrows.append(best)
    return trace_back(blocks, arrows) if np.isfinite(least[-1]) else None


def _critical_path_us(
    costs: IntervalCosts, block: StageBlock, reached: FloatArray, round_trip_us: float, w: int, M: int, speed: float
) -> FloatArray:
    """H_q of a block of intervals."""
    rows, cols, t = block.rows, block.cols, block.load_us
    f = costs.forward[None, cols[0] : cols[1] + 1] - costs.forward[rows[0] : rows[1] + 1, None]
    f = f / speed + costs.exposed_us(rows, cols, (FORWARD,))
    b = t - f
    after = np.maximum(round_trip_us - reached - t, 0.0)
    longest = np.maximum(M * t, np.maximum(f + after + M * b, M * f + after + b))
    if w < M:
        longest = np.maximum(longest, (M - w + 1) * t + 2 * after)
    return np.where(np.isfinite(t), reached + longest, np.inf)


def _hop_us(costs: IntervalCosts, block: StageBlock) -> FloatArray:
    """Hidden time of the messages into an interval, there and back."""
    link = costs.graph.link
    if link.overlap == 0.0:
        return np.zeros_like(block.load_us)
    bytes_us = costs.traffic_bytes(block.rows, block.cols) / link.bytes_per_us
    return np.asarray(link.overlap * (2 * link.latency_us + bytes_us), np.float64)
