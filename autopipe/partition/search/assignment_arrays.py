"""Costs and step times of many assignments of a small graph: arrays over assignments, nothing one by
one.

The figures are those of `stage_costs`, `stage_memory` and the simulator, to which one assignment after another is given
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import CostGraph, FloatArray, IntArray
from autopipe.partition.effort import Effort
from autopipe.partition.memory.model import MemoryModel, MicrobatchBytes
from autopipe.partition.problem import Problem
from autopipe.schedule.actions import Edge
from autopipe.schedule.event_graph import unroll
from autopipe.schedule.kinds import KINDS

CELL_S = 2.5e-9
"""Seconds that an operation on one number of an array takes."""
Pair = tuple[int, int]
Stages = NDArray[np.int8]
"""(A, n) the stage of each node under A assignments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentCosts:
    """Costs of A assignments: (K, A) busy times of the stages, and for each pair of stages (A) how long its messages
    hold the link.

    `sent` and `returned` say whether anything goes from a stage to another, and whether a gradient comes back.
    """

    forward_us: FloatArray
    backward_us: FloatArray
    there_us: dict[Pair, FloatArray]
    back_us: dict[Pair, FloatArray]
    sent: dict[Pair, NDArray[np.bool_]]
    returned: dict[Pair, NDArray[np.bool_]]

    def part(self, rows: IntArray) -> AssignmentCosts:
        """Some of the assignments."""
        return AssignmentCosts(
            forward_us=self.forward_us[:, rows],
            backward_us=self.backward_us[:, rows],
            there_us={pair: us[rows] for pair, us in self.there_us.items()},
            back_us={pair: us[rows] for pair, us in self.back_us.items()},
            sent={pair: there[rows] for pair, there in self.sent.items()},
            returned={pair: there[rows] for pair, there in self.returned.items()},
        )

    @classmethod
    def of(cls, graph: CostGraph, num_stages: int, stages: Stages, again_us: FloatArray) -> AssignmentCosts:
        """Busy times and messages of each assignment, as `StageCosts.busy_us` and `links` have them for one."""
        K, link, readers = num_stages, graph.link, graph.tensor_readers
        pairs = [(s, t) for t in range(K) for s in range(t)]
        sizes = {pair: np.zeros((2, len(stages))) for pair in pairs}
        sent = {pair: np.zeros(len(stages), bool) for pair in pairs}
        for i, maker in enumerate(graph.producer.tolist()):
            by = readers.node[readers.owner == i]
            both = np.array([[graph.tensor_bytes[i]], [graph.gradient_bytes[i]]])
            for t in range(1, K):
                read = (stages[:, by] == t).any(axis=1)
                for s in range(t):
                    crosses = read & (stages[:, maker] == s)
                    sizes[s, t] += both * crosses
                    sent[s, t] |= crosses
        returned = {pair: size[1] > 0 for pair, size in sizes.items()}
        forward = np.stack([(stages == k) @ graph.forward_us for k in range(K)])
        backward = np.stack([(stages == k) @ graph.backward_us for k in range(K)]) + again_us
        there, back = {}, {}
        for (s, t), (out, home) in sizes.items():
            there[s, t] = np.where(sent[s, t], link.latency_us + out / link.bytes_per_us, 0.0)
            back[s, t] = np.where(returned[s, t], link.latency_us + home / link.bytes_per_us, 0.0)
            for k in (s, t):
                forward[k] += graph.exposed * there[s, t]
                backward[k] += graph.exposed * back[s, t]
        hidden = link.overlap
        return cls(
            forward_us=forward,
            backward_us=backward,
            there_us={pair: hidden * us for pair, us in there.items()},
            back_us={pair: hidden * us for pair, us in back.items()},
            sent=sent,
            returned=returned,
        )


def fitting(problem: Problem, stages: Stages) -> tuple[NDArray[np.bool_], FloatArray]:
    """(A) whether all stages fit, and (K, A) the time of what they compute again."""
    graph, memory, K = problem.graph, problem.memory, problem.num_stages
    again = np.zeros((K, len(stages)))
    if not memory.constrains(graph):
        return np.ones(len(stages), bool), again
    all_fit = np.ones(len(stages), bool)
    static, readers, tensors = memory.static_bytes(graph), graph.param_readers, graph.tensor_readers
    for k in range(K):
        on = stages == k
        held = np.zeros(len(stages))
        for p in np.flatnonzero(static > 0):
            held += static[p] * on[:, readers.node[readers.owner == p]].any(axis=1)
        received, sent = np.zeros(len(stages)), np.zeros(len(stages))
        for t, maker in enumerate(graph.producer.tolist()):
            read = on[:, tensors.node[tensors.owner == t]]
            received += graph.tensor_bytes[t] * (read.any(axis=1) & ~on[:, maker])
            sent += graph.tensor_bytes[t] * (on[:, maker] & ~read.all(axis=1))
        left = np.arange(len(stages))
        for option in graph.classes:
            here = on[left]
            micro = MicrobatchBytes(
                saved=here @ option.saved_bytes,
                received=received[left],
                sent=sent[left],
                workspace=(here * option.workspace_bytes).max(axis=1),
                kept=here @ graph.saved_bytes if option.at_once else np.zeros(()),
            )
            fits = memory.peak_bytes(option, held[left], micro, memory.in_flight(k, K)) <= memory.limit(k)
            again[k, left[fits]] = here[fits] @ option.recompute_us
            left = left[~fits]
            if not len(left):
                break
        all_fit[left] = False
    return all_fit, again


def bounds_us(costs: AssignmentCosts, M: int) -> FloatArray:
    """(A) a time that no step of an assignment goes below: H without its last term (autopipe/simulate/bound.py)."""
    f, b = costs.forward_us, costs.backward_us
    K = len(f)
    bound = np.zeros(f.shape[1])
    arrive, leave = np.zeros_like(f), np.zeros_like(f)
    for t in range(K):
        for s in range(t):
            way_in = arrive[s] + f[s] + costs.there_us[s, t]
            way_out = leave[s] + b[s] + costs.back_us[s, t]
            arrive[t] = np.where(costs.sent[s, t], np.maximum(arrive[t], way_in), arrive[t])
            leave[t] = np.where(costs.returned[s, t], np.maximum(leave[t], way_out), leave[t])
    for q in range(K):
        after = _round_trip_us(costs, q)
        paths = np.maximum(M * (f[q] + b[q]), np.maximum(f[q] + after + M * b[q], M * f[q] + after + b[q]))
        bound = np.maximum(bound, arrive[q] + leave[q] + paths)
    return bound


def _round_trip_us(costs: AssignmentCosts, q: int) -> FloatArray:
    """(A) the longest time from the end of a forward on stage q, through later stages, to the start of its backward
    there."""
    f, b = costs.forward_us, costs.backward_us
    there = {q: np.zeros(f.shape[1])}
    back = {q: np.zeros(f.shape[1])}
    longest = np.zeros(f.shape[1])
    for t in range(q + 1, len(f)):
        there[t] = np.full(f.shape[1], -np.inf)
        back[t] = np.full(f.shape[1], -np.inf)
        for s in range(q, t):
            way = there[s] + (f[s] if s > q else 0.0) + costs.there_us[s, t]
            home = back[s] + (b[s] if s > q else 0.0) + costs.back_us[s, t]
            there[t] = np.where(costs.sent[s, t], np.maximum(there[t], way), there[t])
            back[t] = np.where(costs.returned[s, t], np.maximum(back[t], home), back[t])
        longest = np.maximum(longest, there[t] + f[t] + b[t] + back[t])
    return longest


def steps_us(costs: AssignmentCosts, memory: MemoryModel, effort: Effort) -> FloatArray:
    """(A) the simulated steps: the events of a schedule with a message between every two stages, those that are not
    sent left out."""
    K, used = len(costs.forward_us), [pair for pair, there in costs.sent.items() if there.any()]
    edges = [Edge(s, t, bool(costs.returned[s, t].any())) for s, t in sorted(used)]
    program = unroll(KINDS[memory.schedule].orders(K, memory.num_microbatches, K), edges, forward_only=False)
    effort.spend(seconds=len(program.events) * (5e-6 + 4 * CELL_S * costs.forward_us.shape[1]))
    ends: list[FloatArray] = []
    start_of_all = np.zeros(costs.forward_us.shape[1])
    for action, needs, behind in zip(program.events, program.needs, program.queued_behind, strict=True):
        start = ends[behind] if behind >= 0 else start_of_all
        for need in needs:
            made = program.events[need]
            ready = ends[need]
            if made.kind == "SEND_F":
                ready = ready * costs.sent[made.stage, made.peer]
            elif made.kind == "SEND_B":
                ready = ready * costs.returned[made.peer, made.stage]
            start = np.maximum(start, ready)
        match action.kind:
            case "SEND_F":
                duration = costs.there_us[action.stage, action.peer]
            case "SEND_B":
                duration = costs.back_us[action.peer, action.stage]
            case "F":
                duration = costs.forward_us[action.stage]
            case _:
                duration = costs.backward_us[action.stage]
        ends.append(start + duration)
    computes = [i for i, action in enumerate(program.events) if action.peer < 0]
    return np.asarray(np.max([ends[i] for i in computes], axis=0), np.float64)
