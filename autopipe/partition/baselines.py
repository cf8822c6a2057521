"""The splits that a user would otherwise make, in program order: what the plan is compared with."""

from __future__ import annotations

import numpy as np

from autopipe.cost import CostGraph, FloatArray, IntArray, sum_by

EQUAL_NODES = "equal node counts"
EQUAL_PARAMETERS = "equal parameters (DeepSpeed)"
EQUAL_TIME = "equal time without communication (torchgpipe)"


def equal_nodes(graph: CostGraph, num_stages: int) -> IntArray:
    """As many nodes of the profile on every stage (DeepSpeed's `partition_method="uniform"`)."""
    return balanced(np.array([len(members) for members in graph.members], float), num_stages)


def equal_parameters(graph: CostGraph, num_stages: int) -> IntArray:
    """The largest stage has as few trained parameters as possible (DeepSpeed's default, `partition_method="parameters"`)."""
    readers = graph.param_readers
    trained = (graph.param_bytes * graph.trainable)[readers.owner]
    return balanced(sum_by(readers.node, trained, graph.num_nodes), num_stages)


def equal_time(graph: CostGraph, num_stages: int) -> IntArray:
    """The slowest stage computes as little as possible, transfers left out (torchgpipe's `balance_by_time`)."""
    return balanced(graph.work_us, num_stages)


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
