"""Makespan of a step: the planner's objective, called thousands of times.

The dependency graph of a schedule depends only on its kind, K, M and the stage graph. It is unrolled once into rows of
(up to three) predecessors and one duration, and then only evaluated: the longest path, the same sums in the same order
as the simulator's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from autopipe.schedule.actions import COMPUTES, Edge
from autopipe.schedule.costs import Link
from autopipe.schedule.event_graph import EventGraph, unroll
from autopipe.schedule.kinds import DEFAULT, KINDS

Row = tuple[int, int, int, int]
"""Three predecessors (0 is the start of the step) and the index of the duration."""


def step_time_us(
    forward_us: Sequence[float],
    backward_us: Sequence[float],
    links: Mapping[tuple[int, int], Link],
    num_microbatches: int,
    schedule: str = DEFAULT,
    *,
    num_ranks: int | None = None,
    weight_share: float = 0.5,
    split_us: Sequence[float] = (),
    reduce_us: Sequence[float] = (),
) -> float:
    """Makespan of a step; equal to that of `simulate_schedule` on the schedule that was built with the same costs.

    Args:
        forward_us, backward_us: time of each stage for one micro-batch, in microseconds.
        links: for each (source, target) stage, how long a transfer and its gradient hold the link; a gradient time of
            None says that no gradient comes back.
        num_microbatches: M, at least 1.
        schedule: a kind that `build_schedule` knows.
        num_ranks: ranks over which the stages are dealt in turn; None: as many as stages.
        weight_share: the part of the backward that computes weight gradients, if the schedule splits it.
        split_us: how much longer the two parts take than the backward of a stage in one; empty: no longer.
        reduce_us: of each stage, the sum of its gradients over the replicas, after its last backward.
    """
    pairs = tuple(sorted(links))
    edges = tuple((s, t, links[s, t][1] is not None) for s, t in pairs)
    forward_links = [links[pair][0] for pair in pairs]
    backward_links = [links[pair][1] or 0.0 for pair in pairs]
    timed_links = any(forward_links) or any(backward_links)
    rows = _rows(schedule, len(forward_us), num_microbatches, edges, timed_links, num_ranks or len(forward_us))
    divided_us = [b + more for b, more in zip(backward_us, split_us or [0.0] * len(backward_us), strict=True)]
    inputs = [b * (1 - weight_share) for b in divided_us]
    weights = [b * weight_share for b in divided_us]
    end = _ends(rows, [0.0, *forward_us, *backward_us, *inputs, *weights, *forward_links, *backward_links])
    if not any(reduce_us):
        return max(end)
    return max(max(end), _reduced(end, rows, reduce_us, num_ranks or len(forward_us)))


def _reduced(end: list[float], rows: tuple[Row, ...], reduce_us: Sequence[float], num_ranks: int) -> float:
    """Return the end of the last sum over the replicas: on a rank one stage after the other, in the order of their last
    backwards."""
    K = len(reduce_us)
    last = [0.0] * K
    for time_us, row in zip(reversed(end), reversed(rows), strict=False):
        column = row[3] - 1 - K
        if 0 <= column < 3 * K and not last[column % K]:
            last[column % K] = time_us
            if all(last):
                break
    free = [0.0] * num_ranks
    for stage in sorted(range(K), key=lambda s: (last[s], s)):
        if reduce_us[stage] > 0:
            free[stage % num_ranks] = max(free[stage % num_ranks], last[stage]) + reduce_us[stage]
    return max(free)


def _ends(rows: tuple[Row, ...], duration_us: list[float]) -> list[float]:
    """Return the end of each row."""
    end = [0.0]
    append = end.append
    for first, second, third, duration in rows:
        start = end[first]
        other = end[second]
        if other > start:
            start = other
        other = end[third]
        if other > start:
            start = other
        append(start + duration_us[duration])
    return end


@lru_cache(maxsize=256)
def _rows(
    kind: str,
    num_stages: int,
    num_microbatches: int,
    edges: tuple[tuple[int, int, bool], ...],
    timed_links: bool,
    num_ranks: int,
) -> tuple[Row, ...]:
    stage_edges = [Edge(*edge) for edge in edges]
    graph = unroll(
        KINDS[kind].orders(num_stages, num_microbatches, num_ranks),
        stage_edges,
        forward_only=not KINDS[kind].has_backward,
    )
    column = {(e.source, e.target): i for i, e in enumerate(stage_edges)}
    return _compile(graph, num_stages, column, timed_links)


def _compile(
    graph: EventGraph, num_stages: int, column: dict[tuple[int, int], int], timed_links: bool
) -> tuple[Row, ...]:
    rows: list[Row] = []
    row_of: list[int] = []
    for action, needs, behind in zip(graph.events, graph.needs, graph.queued_behind, strict=True):
        if action.peer >= 0 and not timed_links:
            # A transfer that takes no time never holds its reader up beyond its producer: slots and the link are free
            # by the time the reader's rank comes to it.
            row_of.append(row_of[needs[0]])
            continue
        before = [row_of[i] for i in needs] + ([row_of[behind]] if behind >= 0 else [])
        while len(before) > 3:
            rows.append((before[0], before[1], before[2], 0))
            before = [len(rows), *before[3:]]
        match action.kind:
            case "SEND_F":
                duration = 1 + 4 * num_stages + column[action.stage, action.peer]
            case "SEND_B":
                duration = 1 + 4 * num_stages + len(column) + column[action.peer, action.stage]
            case kind:
                duration = 1 + COMPUTES.index(kind) * num_stages + action.stage
        before += [0] * (3 - len(before))
        rows.append((before[0], before[1], before[2], duration))
        row_of.append(len(rows))
    return tuple(rows)
