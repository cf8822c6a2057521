"""Unroll compute orders and a stage graph into one graph of computes and transfers, with its earliest times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from autopipe.errors import ScheduleError
from autopipe.schedule.actions import Action, Edge, Kind
from autopipe.schedule.costs import Costs
from autopipe.schedule.orders import Orders

MAX_POSTED_RECEIVES = 2
"""Receives of one flow that may be posted before their compute: the one that is needed next and one ahead of it."""


StageFlow = tuple[Kind, int, int]
"""The messages of an edge in one direction: the kind of its sends, the stage that makes them and the stage that reads
them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventGraph:
    """Computes and transfers as a dependency graph, in a topological order.

    Attributes:
        events: computes, and transfers as their sends.
        needs: for each event, the events that must have ended before it may be issued: of a compute, the transfers that
            it reads; of a transfer, its producer and the compute that frees the receiver's slot.
        queued_behind: the event before it on its rank (computes) or on its link (transfers), or -1.
    """

    events: tuple[Action, ...]
    needs: tuple[tuple[int, ...], ...]
    queued_behind: tuple[int, ...]


@dataclass(slots=True)
class _FlowEvents:
    """The messages of one edge in one direction, one a micro-batch: event indices of what made, carried and read
    them."""

    send: Kind
    source: int
    target: int
    local: bool
    produced: list[int]
    carried: list[int]
    consumed: list[int]


def flows_of_edges(edges: Sequence[Edge], forward_only: bool) -> list[StageFlow]:
    """Return the flows of edges: one of activations each, and one of gradients if gradients come back."""
    flows: list[StageFlow] = [("SEND_F", e.source, e.target) for e in edges]
    if not forward_only:
        flows += [("SEND_B", e.target, e.source) for e in edges if e.backward]
    return flows


def phase(kind: Kind) -> Kind | None:
    """The kind of transfer that a compute reads and makes; weight gradients have none."""
    return "SEND_F" if kind == "F" else "SEND_B" if kind in ("B", "I") else None


class _Unroller:
    """Walk the ranks' compute orders and append every event once what it needs is there."""

    def __init__(self, orders: Orders, edges: Sequence[Edge], forward_only: bool) -> None:
        self.orders, self.ranks = orders, len(orders)
        self.events: list[Action] = []
        self.needs: list[tuple[int, ...]] = []
        self.behind: list[int] = []
        self.inward: dict[tuple[Kind | None, int], list[_FlowEvents]] = defaultdict(list)
        self.outward: dict[tuple[Kind | None, int], list[_FlowEvents]] = defaultdict(list)
        for send, source, target in flows_of_edges(edges, forward_only):
            flow = _FlowEvents(send, source, target, source % self.ranks == target % self.ranks, [], [], [])
            self.inward[send, target].append(flow)
            self.outward[send, source].append(flow)

    def run(self) -> EventGraph:
        position, last = [0] * self.ranks, [-1] * self.ranks
        moved = True
        while moved:
            moved = False
            for rank, order in enumerate(self.orders):
                while position[rank] < len(order) and self._ready(order[position[rank]]):
                    last[rank] = self._compute(order[position[rank]], last[rank])
                    position[rank] += 1
                    moved = True
        if any(p < len(order) for p, order in zip(position, self.orders, strict=True)):
            stuck = [str(o[p]) for p, o in zip(position, self.orders, strict=True) if p < len(o)]
            raise ScheduleError(
                f"computes that wait for each other: {', '.join(stuck)}",
                expected="an order in which every compute can run",
                remedy="report this as a bug in autopipe, with the schedule, its stages and micro-batches",
            )
        return EventGraph(events=tuple(self.events), needs=tuple(self.needs), queued_behind=tuple(self.behind))

    def _ready(self, action: Action) -> bool:
        flows = self.inward[phase(action.kind), action.stage]
        return all(len(flow.carried) > action.microbatch for flow in flows)

    def _add(self, action: Action, needs: tuple[int, ...], behind: int) -> int:
        self.events.append(action)
        self.needs.append(needs)
        self.behind.append(behind)
        return len(self.events) - 1

    def _compute(self, action: Action, behind: int) -> int:
        key = (phase(action.kind), action.stage)
        index = self._add(action, tuple(f.carried[action.microbatch] for f in self.inward[key]), behind)
        for flow in self.inward[key]:
            flow.consumed.append(index)
            self._carry(flow)
        for flow in self.outward[key]:
            flow.produced.append(index)
            self._carry(flow)
        return index

    def _carry(self, flow: _FlowEvents) -> None:
        """Append the transfers that now have both their producer and a slot at the receiver."""
        while len(flow.carried) < min(len(flow.produced), len(flow.consumed) + MAX_POSTED_RECEIVES):
            message = len(flow.carried)
            if flow.local:
                flow.carried.append(flow.produced[message])
                continue
            needs: tuple[int, ...] = (flow.produced[message],)
            if message >= MAX_POSTED_RECEIVES:
                needs += (flow.consumed[message - MAX_POSTED_RECEIVES],)
            behind = flow.carried[-1] if flow.carried else -1
            action = Action(flow.send, flow.source, self.events[flow.produced[message]].microbatch, flow.target)
            flow.carried.append(self._add(action, needs, behind))


def unroll(orders: Orders, edges: Sequence[Edge], *, forward_only: bool) -> EventGraph:
    """Return the dependency graph of a schedule; a transfer waits for its producer and for a free slot at the receiver.

    Raises:
        ScheduleError: the compute orders wait for each other.
    """
    return _Unroller(orders, edges, forward_only).run()


def issue_times_us(graph: EventGraph, costs: Costs) -> list[float]:
    """Return the time of each event by which the global order is sorted: a transfer's issue, a compute's end.

    A receive that can be issued while its rank computes thus comes before that compute, and a send right after its
    producer. Both are topological: a compute ends after its transfers were issued, a transfer is issued after its
    producer ended.
    """
    end: list[float] = []
    issue: list[float] = []
    for action, needs, behind in zip(graph.events, graph.needs, graph.queued_behind, strict=True):
        ready = max((end[i] for i in needs), default=0.0)
        start = max(ready, end[behind]) if behind >= 0 else ready
        end.append(start + costs.duration_us(action))
        issue.append(ready if action.peer >= 0 else end[-1])
    return issue
