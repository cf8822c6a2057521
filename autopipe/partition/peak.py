"""The most memory that a stage holds: its list of actions is gone through, and inside a backward, its nodes.

The planner's search charges every stage `StageMemory.peak_bytes`, a sum of parts, each at its largest. Here they are put together as
they meet: which receives are posted and which gradients are on their way at each action, which saved tensors are left and which
gradients of values are there at each node, and that the gradients of parameters appear during the first backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopipe.cost import CostGraph, FloatArray, IntArray, StageCosts, sum_by
from autopipe.partition.memory import MemoryModel, StageMemory, received_bytes
from autopipe.schedule import Action, Costs, Edge, build_schedule
from autopipe.schedule.program import MAX_POSTED_RECEIVES


@dataclass(frozen=True, slots=True, kw_only=True)
class StageHold:
    """What one stage holds, in bytes.

    Attributes:
        static_bytes: parameters, buffers and optimizer state.
        gradient_bytes: gradients of its parameters.
        held_bytes: what a micro-batch keeps from its forward to its backward.
        first_bytes: the most during the first backward, its own micro-batch and the gradients that appear counted.
        later_bytes: the most during a later one, its own micro-batch counted and gradients of parameters not.
    """

    static_bytes: float
    gradient_bytes: float
    held_bytes: float
    first_bytes: float
    later_bytes: float


def expected_peak_bytes(
    graph: CostGraph, memory: MemoryModel, parts: StageMemory, costs: StageCosts, stage_of: IntArray
) -> FloatArray:
    """(K) the most that each stage holds during a step, under an assignment `stage_of` (n) of nodes to stages.

    A stage that computes again is charged as in the search.

    Args:
        parts, costs: `stage_memory` and `stage_costs` of the same assignment.
    """
    K = len(parts.param_bytes)
    there, back = edge_bytes(graph, stage_of, K)
    edges = [Edge(int(s), int(t), bool(back[s, t])) for s, t in np.argwhere(there > 0)]
    forward, backward = costs.busy_us()
    times = Costs(forward_us=tuple(forward.tolist()), backward_us=tuple(backward.tolist()), links=costs.links())
    schedule = build_schedule(memory.schedule, K, memory.num_microbatches, edges, costs=times)
    peaks = parts.peak_bytes
    for k in range(K):
        if graph.classes[int(parts.recompute[k])].is_none:
            peaks[k] = _walked(schedule.actions[k], stage_hold(graph, parts, stage_of, k), k, there, back)
    return peaks


def edge_bytes(graph: CostGraph, stage_of: IntArray, num_stages: int) -> tuple[FloatArray, FloatArray]:
    """(K, K), (K, K) bytes of a micro-batch from a stage to another, and of the gradients that come back."""
    owner, target = graph.tensor_readers.owner, stage_of[graph.tensor_readers.node]
    keys = np.unique(owner * num_stages + target)
    tensor, reader = keys // num_stages, keys % num_stages
    maker = stage_of[graph.producer[tensor]]
    crosses = (maker != reader).astype(float)
    place, size = maker * num_stages + reader, num_stages * num_stages
    there, back = (
        sum_by(place, crosses * sizes[tensor], size).reshape(num_stages, num_stages)
        for sizes in (graph.tensor_bytes, graph.gradient_bytes)
    )
    return there, back


def stage_hold(graph: CostGraph, parts: StageMemory, stage_of: IntArray, stage: int) -> StageHold:
    """What a stage holds between and within its computes.

    While the backward of a node runs, there are the saved tensors of the nodes up to it, its workspace, and the gradients of values
    that a later node has read and an earlier one has made.
    """
    nodes = np.flatnonzero(stage_of == stage)
    place = np.full(graph.num_nodes, -1)
    place[nodes] = np.arange(len(nodes))
    owner, reader = graph.tensor_readers.owner, graph.tensor_readers.node
    inside = stage_of[reader] == stage
    last = np.full(len(graph.producer), -1)
    np.maximum.at(last, owner[inside], place[reader[inside]])
    first = np.where(stage_of[graph.producer] == stage, place[graph.producer], -1)
    # A gradient is there between the nodes that read its value and the one that made it: + at first + 1, - at last.
    change = np.zeros(len(nodes) + 1)
    alive = last > first + 1
    np.add.at(change, first[alive] + 1, graph.gradient_bytes[alive])
    np.add.at(change, last[alive], -graph.gradient_bytes[alive])
    gradients = np.cumsum(change)[:-1]
    received = received_bytes(graph, stage_of, len(parts.param_bytes))[stage]
    leaving = np.unique(owner[(stage_of[graph.producer[owner]] == stage) & ~inside])
    unsaved = np.maximum(graph.tensor_bytes[leaving] - graph.saved_bytes[graph.producer[leaving]], 0.0).sum()
    kept = received + unsaved
    within = kept + np.cumsum(graph.saved_bytes[nodes]) + gradients + graph.workspace_bytes[nodes]
    return StageHold(
        static_bytes=float(parts.param_bytes[stage] + parts.optimizer_bytes[stage]),
        gradient_bytes=float(parts.gradient_bytes[stage]),
        held_bytes=float(kept + graph.saved_bytes[nodes].sum()),
        first_bytes=float((within + _gradients_after(graph, nodes)).max()),
        later_bytes=float(within.max()),
    )


def _gradients_after(graph: CostGraph, nodes: IntArray) -> FloatArray:
    """For each node of a stage, the gradients of parameters that the backwards of later nodes have made."""
    trained = graph.param_bytes * graph.trainable
    inside = np.isin(graph.param_readers.node, nodes)
    latest = np.full(len(trained), -1)
    np.maximum.at(latest, graph.param_readers.owner[inside], graph.param_readers.node[inside])
    made = np.zeros(graph.num_nodes)
    np.add.at(made, latest[latest >= 0], trained[latest >= 0])
    return np.asarray(np.cumsum(made[nodes][::-1])[::-1] - made[nodes], np.float64)


def _walked(actions: tuple[Action, ...], hold: StageHold, stage: int, there: FloatArray, back: FloatArray) -> float:
    """The peak over a rank's actions. The engine waits for a sent gradient when two more have been sent."""
    posted: dict[tuple[str, int], float] = {}
    num_held, num_backwards, sent, peak = 0, 0, 0.0, 0.0
    for action in actions:
        match action.kind:
            case "RECV_F":
                posted["F", action.microbatch] = posted.get(("F", action.microbatch), 0.0) + there[action.peer, stage]
            case "RECV_B":
                posted["B", action.microbatch] = posted.get(("B", action.microbatch), 0.0) + back[stage, action.peer]
            case "F":
                posted.pop(("F", action.microbatch), None)
                num_held += 1
                peak = max(peak, _level(hold, num_held, num_backwards) + sum(posted.values()) + sent)
            case "B":
                peak = max(peak, _level(hold, num_held, num_backwards) + sum(posted.values()) + sent)
                posted.pop(("B", action.microbatch), None)
                num_held, num_backwards = num_held - 1, num_backwards + 1
                sent = min(num_backwards, MAX_POSTED_RECEIVES) * float(back[:, stage].sum())
    return hold.static_bytes + peak


def _level(hold: StageHold, num_held: int, num_backwards: int) -> float:
    """Bytes beside static ones and messages while a compute runs on the last of `num_held` micro-batches."""
    own = hold.later_bytes + hold.gradient_bytes if num_backwards else hold.first_bytes
    return (num_held - 1) * hold.held_bytes + own
