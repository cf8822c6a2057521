"""All splits of a small graph that can beat the best one known, played at once: the shortest step there is, and its
proof.

Assignments grow node by node, in topological order: a node is on the stage of its latest predecessor or on a later one.
Those that cannot win are dropped, first where M times the work of a stage is too long already, then by the
critical-path bound H of 1F1B (steps_dp.py). What is left is simulated (batch.py). Where the assignments become too many
nothing is said.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import IntArray
from autopipe.partition.effort import Effort
from autopipe.partition.problem import Problem
from autopipe.partition.search.assignment_arrays import CELL_S, AssignmentCosts, Stages, bounds_us, fitting, steps_us

MOST_NODES, MOST_ASSIGNMENTS = 64, 150_000
CHUNK = 8192
"""Assignments that are costed and played at once: few enough for their arrays to stay in the cache."""


def shortest_of_all(problem: Problem, upper_us: float, effort: Effort) -> tuple[float, IntArray | None] | None:
    """The least simulated step below `upper_us` and its assignment, or `upper_us` and None where there is none.

    None where the assignments are too many to try, or devices are not all alike.
    """
    if problem.graph.devices is not None or problem.graph.num_nodes > MOST_NODES:
        return None
    every = _assignments(problem, upper_us, effort)
    if every is None:
        return None
    best, found = upper_us, None
    for start in range(0, len(every), CHUNK):
        stages = every[start : start + CHUNK]
        stages = stages[_obeys(problem, stages)]
        fits, again = fitting(problem, stages)
        stages = stages[fits]
        if not len(stages):
            continue
        costs = AssignmentCosts.of(problem.graph, problem.num_stages, stages, again[:, fits])
        bound = bounds_us(costs, problem.memory.num_microbatches)
        rows = np.argsort(bound, kind="stable")
        rows = rows[bound[rows] < best * (1 - 1e-9)]
        effort.spend(seconds=CELL_S * stages.size * (20 + 6 * problem.num_stages**2))
        if len(rows):
            steps = steps_us(costs.part(rows), problem.memory, effort)
            if steps.min() < best * (1 - 1e-9):
                best, found = float(steps.min()), stages[rows[steps.argmin()]].astype(np.int64)
    return best, found


def _assignments(problem: Problem, upper_us: float, effort: Effort) -> Stages | None:
    """(A, n) every monotone assignment without empty stages whose work may be done within the step; None where they are
    too many."""
    graph, K, most = problem.graph, problem.num_stages, upper_us / problem.memory.num_microbatches * (1 + 1e-9)
    found, work = np.zeros((1, graph.num_nodes), np.int8), np.zeros((1, K))
    for v, before in enumerate(graph.predecessors):
        low = found[:, before].max(axis=1) if before else np.zeros(len(found), np.int8)
        rows, stage = np.nonzero((np.arange(K) >= low[:, None]) & (work + graph.work_us[v] / graph.speed(K) <= most))
        effort.spend(seconds=CELL_S * len(rows) * (graph.num_nodes + 20 * K))
        if len(rows) > MOST_ASSIGNMENTS or effort.spent:
            return None
        found, work = found[rows], work[rows]
        found[:, v] = stage
        work[np.arange(len(rows)), stage] += graph.work_us[v]
    return found[np.all([(found == k).any(axis=1) for k in range(K)], axis=0)]


def _obeys(problem: Problem, stages: Stages) -> NDArray[np.bool_]:
    """(A) whether an assignment does what the rules demand."""
    rules, last = problem.rules, problem.num_stages - 1
    obeys = (stages[:, rules.first] == 0).all(axis=1) & (stages[:, rules.last] == last).all(axis=1)
    for v in rules.alone.tolist():
        obeys &= (stages == stages[:, v : v + 1]).sum(axis=1) == 1
    return np.asarray(obeys, np.bool_)
