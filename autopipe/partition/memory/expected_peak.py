"""The most memory that a stage holds: its list of actions is gone through.

The planner's search charges every stage `StageMemory.peak_bytes`, a sum of parts, each at its largest. Here they are
put together as they meet: which receives are posted and which gradients are on their way at each action, and what each
compute holds (`hold.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import CostGraph, FloatArray, IntArray, StageCosts, sum_by
from autopipe.partition.memory.live_bytes import StageLiveBytes, Values, stage_hold
from autopipe.partition.memory.model import OPTIMIZER_STATES, MemoryModel, StageMemory, received_bytes
from autopipe.schedule import Action, Costs, Edge, build_schedule
from autopipe.schedule.event_graph import MAX_POSTED_RECEIVES
from profiler.records import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """Messages between stages.

    Attributes:
        there, back: (K, K) as `edge_bytes` gives them.
        buffered: as in `LinkProfile`.
    """

    there: FloatArray
    back: FloatArray
    buffered: bool


def expected_peak_bytes(
    profile: Profile,
    graph: CostGraph,
    memory: MemoryModel,
    parts: StageMemory,
    costs: StageCosts,
    stage_of: IntArray,
) -> FloatArray:
    """(K) the most that each stage holds during a step, under an assignment `stage_of` (n) of the graph's nodes to
    stages.

    A stage that computes again is charged as in the search.

    Args:
        profile: what the graph was made from.
        parts, costs: `stage_memory` and `stage_costs` of the same assignment.
    """
    K = len(parts.param_bytes)
    there, back = edge_bytes(graph, stage_of, K)
    edges = [Edge(int(s), int(t), bool(back[s, t])) for s, t in np.argwhere(there > 0)]
    forward, backward = costs.busy_us()
    times = Costs(forward_us=tuple(forward.tolist()), backward_us=tuple(backward.tolist()), links=costs.links())
    schedule = build_schedule(memory.schedule, K, memory.num_microbatches, edges, costs=times)
    messages = Messages(there=there, back=back, buffered=graph.link.buffered)
    received = received_bytes(graph, stage_of, K)
    values = Values(profile, graph)
    peaks = parts.peak_bytes
    for k in range(K):
        if graph.classes[int(parts.recompute[k])].is_none:
            hold = stage_hold(values, parts, stage_of, k, float(received[k]))
            walked = _walked(schedule.actions[k], hold, k, messages)
            stepped = hold.gradient_bytes + _optimizer_bytes(profile, graph, memory, stage_of == k)
            peaks[k] = hold.static_bytes + max(walked, stepped)
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


def _walked(actions: tuple[Action, ...], hold: StageLiveBytes, stage: int, messages: Messages) -> float:
    """The peak over a rank's actions, beside what is static. The engine waits for a sent gradient when two more have
    been sent."""
    posted: dict[tuple[str, int], float] = {}
    back_here, back_sent = float(messages.back[stage].sum()), float(messages.back[:, stage].sum())
    num_held, num_backwards, sent, peak = 0, 0, 0.0, 0.0
    for action in actions:
        m, under_way = action.microbatch, 0.0 if messages.buffered else sent
        match action.kind:
            case "RECV_F" if not messages.buffered:
                posted["F", m] = posted.get(("F", m), 0.0) + messages.there[action.peer, stage]
            case "RECV_B" if not messages.buffered:
                posted["B", m] = posted.get(("B", m), 0.0) + messages.back[stage, action.peer]
            case "F":
                posted.pop(("F", m), None)
                num_held += 1
                peak = max(peak, _level(hold, num_held, num_backwards) + sum(posted.values()) + under_way)
            case "B":
                posted["B", m] = back_here
                peak = max(peak, _level(hold, num_held, num_backwards) + sum(posted.values()) + under_way)
                posted.pop(("B", m), None)
                num_held, num_backwards = num_held - 1, num_backwards + 1
                sent = min(num_backwards, MAX_POSTED_RECEIVES) * back_sent
    return peak


def _optimizer_bytes(profile: Profile, graph: CostGraph, memory: MemoryModel, mine: NDArray[np.bool_]) -> float:
    """Tensors that the optimizer makes and drops in its step: torch's Adam on a CPU two tensors like one parameter,
    elsewhere, where it goes through all parameters at once, one like each."""
    if memory.states < OPTIMIZER_STATES["adam"]:
        return 0.0
    here = np.unique(graph.param_readers.owner[mine[graph.param_readers.node]])
    trained = (graph.param_bytes * graph.trainable)[here]
    if profile.device.startswith("cpu"):
        return 2.0 * float(trained.max(initial=0.0))
    return float(trained.sum()) / memory.shards


def _level(hold: StageLiveBytes, num_held: int, num_backwards: int) -> float:
    """Bytes beside static ones and messages while a compute runs on the last of `num_held` micro-batches."""
    own = hold.later_bytes + hold.gradient_bytes if num_backwards else hold.first_bytes
    return (num_held - 1) * hold.held_bytes + own
