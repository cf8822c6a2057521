"""The splits that a user would otherwise make, in program order: what the plan is compared with."""

from __future__ import annotations

import numpy as np

from autopipe.cost import CostGraph, FloatArray, IntArray, sum_by

EQUAL_NODES = "equal node counts"
EQUAL_PARAMETERS = "equal parameters (DeepSpeed)"
EQUAL_TIME = "equal time without communication (torchgpipe)"
PIPEDREAM = "PipeDream's DP"
PIPEDREAM_POSITIONS = 1500


def equal_nodes(graph: CostGraph, num_stages: int) -> IntArray:
    """As many nodes of the profile on every stage (DeepSpeed's `partition_method="uniform"`)."""
    return balanced(np.array([len(members) for members in graph.members], float), num_stages)


def equal_parameters(graph: CostGraph, num_stages: int) -> IntArray:
    """The largest stage has as few trained parameters as possible (DeepSpeed's default,
    `partition_method="parameters"`)."""
    readers = graph.param_readers
    trained = (graph.param_bytes * graph.trainable)[readers.owner]
    return balanced(sum_by(readers.node, trained, graph.num_nodes), num_stages)


def equal_time(graph: CostGraph, num_stages: int) -> IntArray:
    """The slowest stage computes as little as possible, transfers left out (torchgpipe's `balance_by_time`)."""
    return balanced(graph.work_us, num_stages)


def pipedream(graph: CostGraph, num_stages: int) -> IntArray:
    """PipeDream's partition of a line of layers (Narayanan et al., SOSP 2019, section 3.1, without replication).

        A(j, k) = min over i < j of max(A(i, k - 1), 2 a_i / B, T(i + 1 .. j))

    a_i is the output of layer i alone: what skips past it is not seen. A transfer is a stage of its own, never added to
    compute.
    """
    n, K = graph.num_nodes, num_stages
    cuts = np.unique(np.linspace(0, n, min(n, max(PIPEDREAM_POSITIONS, K)) + 1).round().astype(np.int64))
    work = np.concatenate([[0.0], np.cumsum(graph.work_us)])[cuts]
    sent = np.concatenate([[0.0], sum_by(graph.producer, graph.tensor_bytes + graph.gradient_bytes, n)])[cuts]
    compute = np.where(np.arange(len(cuts))[:, None] < np.arange(len(cuts)), work[None, :] - work[:, None], np.inf)
    least, arrows = np.where(cuts == 0, 0.0, np.inf), []
    for _ in range(K):
        through = np.maximum(np.maximum(least, sent / graph.link.bytes_per_us)[:, None], compute)
        best = through.argmin(axis=0)
        least = through[best, np.arange(len(cuts))]
        arrows.append(best)
    at, bounds = len(cuts) - 1, [n]
    for best in reversed(arrows):
        at = int(best[at])
        bounds.append(int(cuts[at]))
    return np.repeat(np.arange(K), np.diff(bounds[::-1])).astype(np.int64)


def balanced(weights: FloatArray, num_stages: int) -> IntArray:
    """Stages of consecutive nodes, none empty, with the least largest sum of weights: bisection over greedy filling."""
    prefix = np.concatenate([[0.0], np.cumsum(weights)])
    low, high = float(weights.max()), float(prefix[-1])
    best = _filled(prefix, high, num_stages)
    for _ in range(60):
        middle = (low + high) / 2
        bounds = _filled(prefix, middle, num_stages)
        if bounds[-1] == len(weights):
            best, high = bounds, middle
        else:
            low = middle
    return np.repeat(np.arange(num_stages), np.diff(best)).astype(np.int64)


def _filled(prefix: FloatArray, limit: float, num_stages: int) -> list[int]:
    """Borders of stages that are filled one after another up to the limit, a node left for each stage that follows."""
    bounds, n = [0], len(prefix) - 1
    for k in range(num_stages):
        fits = int(np.searchsorted(prefix, prefix[bounds[-1]] + limit * (1 + 1e-12), "right")) - 1
        bounds.append(min(max(fits, bounds[-1] + 1), n - (num_stages - 1 - k)))
    return bounds
