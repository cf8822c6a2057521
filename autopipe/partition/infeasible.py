"""Reasons why nothing fits: the split that comes nearest, the stage that lacks memory, how much, and what would make it
fit."""

from __future__ import annotations

import dataclasses

import numpy as np

from autopipe.cost import IntArray
from autopipe.errors import PartitionError
from autopipe.partition.dp.intervals import IntervalCosts
from autopipe.partition.memory.model import stage_memory
from autopipe.partition.problem import Problem
from autopipe.units import MIB


def least_peak_split(problem: Problem) -> IntArray:
    """The split of the program order whose largest peak of memory is least: F_k[j] = min_i max(F_(k-1)[i], peak_k(i,
    j))."""
    n, K = problem.graph.num_nodes, problem.num_stages
    bounded = dataclasses.replace(problem.memory, limit_bytes=0.0, limits=())  # so that memory is counted
    grid = np.unique(np.linspace(0, n, min(n, max(400, K)) + 1).round().astype(np.int64))
    costs = IntervalCosts(problem.graph, np.arange(n), bounded, grid)
    last, least, arrows = len(grid) - 1, np.full(len(grid), np.inf), []
    least[0] = 0.0
    empty = np.arange(last + 1)[:, None] >= np.arange(last + 1)[None, :]
    for k in range(K):
        peak = costs.least_peak_bytes((0, last), (0, last), k, K)
        through = np.maximum(least[:, None], np.where(empty, np.inf, peak))
        best = through.argmin(axis=0)
        least = through[best, np.arange(last + 1)]
        arrows.append(best)
    cuts, position = [], last
    for best in reversed(arrows):
        position = int(best[position])
        cuts.append(position)
    return costs.stages(tuple(reversed(cuts[:-1])))


def check_fits(problem: Problem, stage_of: IntArray) -> None:
    """Raises a `PartitionError` where a stage of this assignment needs more than its device has."""
    if not problem.memory.fits(stage_memory(problem.graph, problem.memory, stage_of, problem.num_stages).peak_bytes):
        raise too_little_memory(problem, stage_of)


def too_little_memory(problem: Problem, stage_of: IntArray) -> PartitionError:
    """The error for an assignment that does not fit, with what would."""
    memory = stage_memory(problem.graph, problem.memory, stage_of, problem.num_stages)
    lacking = memory.peak_bytes - [problem.memory.limit(k) for k in range(problem.num_stages)]
    k = int(lacking.argmax())
    limit = problem.memory.limit(k)
    peak = float(memory.peak_bytes[k])
    parts = {
        "parameters": memory.param_bytes[k],
        "gradients": memory.gradient_bytes[k],
        "optimizer state": memory.optimizer_bytes[k],
        "activations": memory.activation_bytes[k],
        "workspace": memory.workspace_bytes[k],
    }
    listed = ", ".join(f"{name} {value / MIB:.1f}" for name, value in parts.items() if value)
    return PartitionError(
        f"stage {k} of {problem.num_stages} needs {peak / MIB:.1f} MiB ({listed}), "
        f"{(peak - limit) / MIB:.1f} MiB more than it has",
        expected=f"at most {limit / MIB:.1f} MiB on each device",
        where=f"memory_limit, stage {k}",
        remedy=_remedy(problem, peak - limit, float(memory.activation_bytes[k] + memory.workspace_bytes[k])),
    )


def _remedy(problem: Problem, lacking: float, per_sample: float) -> str:
    """Changes that would make it fit; `per_sample` are the bytes of the stage that shrink with a micro-batch."""
    ways = []
    most = min(2 * problem.num_stages + 8, problem.graph.num_nodes)
    if problem.memory.limits:
        most = problem.num_stages  # whose memory a further stage would have is not known
    for num_stages in range(problem.num_stages + 1, most + 1):
        if _would_fit(dataclasses.replace(problem, num_stages=num_stages)):
            ways.append(f"{num_stages} stages")
            break
    if problem.with_recompute is not None and _would_fit(dataclasses.replace(problem, graph=problem.with_recompute())):
        ways.append("recompute of activations (recompute='auto')")
    if per_sample > lacking:
        ways.append(f"a micro-batch {per_sample / (per_sample - lacking):.1f} times smaller")
    if problem.memory.states and problem.memory.shards == 1:
        ways.append("ZeRO-1 over several replicas, or an optimizer with less state")
    if not ways:
        return "use devices with more memory: the static part alone does not fit"
    return f"it would fit with {'; or '.join(ways)}"


def _would_fit(problem: Problem) -> bool:
    """Whether the split of the program order that needs least does."""
    stage_of = least_peak_split(problem)
    return problem.memory.fits(stage_memory(problem.graph, problem.memory, stage_of, problem.num_stages).peak_bytes)
