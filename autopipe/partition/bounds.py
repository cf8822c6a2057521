"""Lower bounds that no split can beat: on the largest load and on the time of a step."""

from __future__ import annotations

import numpy as np

from autopipe.cost import CostGraph


def load_bound_us(graph: CostGraph, num_stages: int) -> float:
    """The largest load is at least the work over the speed of all stages, and at least the heaviest node on the
    fastest."""
    work, speed = graph.work_us, graph.speed(num_stages)
    return max(float(work.sum()) / float(speed.sum()), float(work.max()) / float(speed.max()))


def step_bound_us(
    graph: CostGraph, num_stages: int, num_microbatches: int, load_us: float, *, divided: bool = False
) -> float:
    """A time of a step that no split into K stages can beat, given a bound on the largest load.

    With `divided` backwards (zero-bubble schedules) only the forward of the path must lie before what a stage does.

    Three arguments. A stage runs M micro-batches one after another: M · load. A micro-batch runs through the heaviest
    path of the graph and back. And with P the work on that path and S_q the part of it before stage q, M · t_q + S_q <=
    T for every stage that holds a part of the path: the stages have room for the whole work W only if T is large
    enough. Their room is largest when the path lies as late as it can, which gives a fold over the stages and a
    bisection on T.
    """
    M, total, speed = num_microbatches, float(graph.work_us.sum()), graph.speed(num_stages)
    path = heaviest_path_us(graph, forward_only=divided) / float(speed.max())
    low = max(M * load_us, path)
    if speed.min() < speed.max():  # the third argument counts every stage alike
        return low
    total /= float(speed.max())
    high = max(low, M * total)
    if _room_us(low, path, num_stages, M) >= total:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        if _room_us(middle, path, num_stages, M) >= total:
            high = middle
        else:
            low = middle
    return low


def _room_us(step: float, path: float, num_stages: int, num_microbatches: int) -> float:
    """Most work that fits into K stages in a step of this length, the path among it: filled from the last stage on.

    Stage q holds p <= t of the path and `before` - p lies before it: M t + before - p <= T, so t = (T - before) / (M -
    1) while the path fills the stage, and T / M once it is used up.
    """
    M, room, before = num_microbatches, 0.0, path
    for stage in reversed(range(num_stages)):
        here = step / M
        if before > here:
            if before > step or stage == 0:
                return 0.0
            here = step if M == 1 else (step - before) / (M - 1)
        before -= min(here, before)
        room += here
    return room


def heaviest_path_us(graph: CostGraph, *, forward_only: bool = False) -> float:
    """The most work that one micro-batch does one after the other: forward along a path, and backward while gradients
    flow.

    Nodes are numbered in topological order.
    """
    gradient = graph.gradient_bytes[graph.tensor_readers.owner] > 0
    flows = set(
        zip(
            graph.producer[graph.tensor_readers.owner[gradient]].tolist(),
            graph.tensor_readers.node[gradient].tolist(),
            strict=True,
        )
    )
    there, back = np.zeros(graph.num_nodes), np.zeros(graph.num_nodes)
    for v, before in enumerate(graph.predecessors):
        there[v] = graph.forward_us[v] + max((there[u] for u in before), default=0.0)
        both = (back[u] if (u, v) in flows else there[u] for u in before)
        back[v] = graph.work_us[v] + max(both, default=0.0)
    return float(there.max() if forward_only else max(there.max(), back.max()))
