"""Play a schedule against costs: each rank runs its actions in order, each link is a resource."""

from __future__ import annotations

from collections import Counter, defaultdict

from autopipe.schedule.actions import COMPUTES, RECEIVE_OF, Action, Kind, Schedule, sides
from autopipe.schedule.costs import Costs
from autopipe.schedule.event_graph import phase
from autopipe.schedule.kinds import KINDS
from autopipe.simulate.timeline import Event, Timeline


def simulate_schedule(schedule: Schedule, costs: Costs) -> Timeline:
    """Play a schedule as the engine executes it.

    A compute holds its rank and starts when the rank has come to it and what it reads has arrived. Sends and receives
    are issued when the rank comes to them and do not hold it; the transfer starts when both ends are issued and its
    link, one for each edge and direction, is free. A reduction of tied parameters is issued like a transfer and takes
    no time; those over the replicas come last.

    Args:
        schedule: made by `build_schedule`, whose lists are restrictions of its order.
        costs: times and sizes for one micro-batch.
    """
    clock = [0.0] * schedule.num_ranks
    busy = [0.0] * schedule.num_ranks
    link_free: dict[tuple[Kind, int, int], float] = defaultdict(float)
    arrived: dict[tuple[Kind | None, int, int], float] = defaultdict(float)
    local = [e for e in schedule.edges if schedule.is_local(e)]
    events: list[Event] = []
    for action in schedule.order:
        duration = costs.duration_us(action)
        rank = schedule.rank_of(action.stage)
        if action.kind in RECEIVE_OF:
            link = (action.kind, action.stage, action.peer)
            start = max(clock[rank], clock[schedule.rank_of(action.peer)], link_free[link])
            link_free[link] = start + duration
            _arrive(arrived, action.kind, action.peer, action.microbatch, start + duration)
        elif action.kind in COMPUTES:
            start = max(clock[rank], arrived[phase(action.kind), action.stage, action.microbatch])
            clock[rank] = start + duration
            busy[rank] += duration
            for edge in local:
                _hand_over(arrived, action, edge.source, edge.target, clock[rank])
        else:
            parts = sides(action, schedule.num_ranks, schedule.reductions)
            start = max(clock[schedule.rank_of(part.stage)] for part in parts)
        events.append(Event(rank, action.kind, action.stage, action.microbatch, action.peer, start, start + duration))
    if any(costs.reduce_us):
        events += _reductions(schedule, costs, events)
    makespan = max(event.end_us for event in events)
    return Timeline(
        events=tuple(events),
        makespan_us=makespan,
        bubble=tuple(1.0 - b / makespan if makespan else 0.0 for b in busy),
        peak_bytes=_peak_bytes(schedule, costs),
    )


def _reductions(schedule: Schedule, costs: Costs, events: list[Event]) -> list[Event]:
    """The sums of gradients over the replicas: of each stage after its last backward, on a rank one after the other."""
    last: dict[int, float] = {}
    for event in events:
        if event.kind in ("B", "I", "W"):
            last[event.stage] = max(last.get(event.stage, 0.0), event.end_us)
    free = [0.0] * schedule.num_ranks
    found = []
    for stage in sorted(last, key=lambda s: (last[s], s)):
        duration = costs.reduce_us[stage]
        if duration > 0:
            rank = schedule.rank_of(stage)
            start = max(last[stage], free[rank])
            free[rank] = start + duration
            found.append(Event(rank, "REDUCE_GRAD", stage, schedule.num_microbatches - 1, -1, start, free[rank]))
    return found


def _arrive(
    arrived: dict[tuple[Kind | None, int, int], float], kind: Kind, stage: int, microbatch: int, time_us: float
) -> None:
    arrived[kind, stage, microbatch] = max(arrived[kind, stage, microbatch], time_us)


def _hand_over(
    arrived: dict[tuple[Kind | None, int, int], float], action: Action, source: int, target: int, time_us: float
) -> None:
    """Nothing is sent between two stages of one rank: what one makes is there for the other."""
    if phase(action.kind) == "SEND_F" and action.stage == source:
        _arrive(arrived, "SEND_F", target, action.microbatch, time_us)
    elif phase(action.kind) == "SEND_B" and action.stage == target:
        _arrive(arrived, "SEND_B", source, action.microbatch, time_us)


def _peak_bytes(schedule: Schedule, costs: Costs) -> tuple[int, ...]:
    """Static memory of a rank's stages, and the most activations that its list keeps alive at once."""
    peaks = []
    for rank, actions in enumerate(schedule.actions):
        stages = range(rank, schedule.num_stages, schedule.num_ranks)
        static = sum(costs.static_bytes[s] for s in stages) if costs.static_bytes else 0
        split = {a.stage for a in actions if a.kind == "W"}
        live = peak = 0
        for kind, stage in ((a.kind, a.stage) for a in actions if a.kind in COMPUTES):
            size = costs.activation_bytes[stage] if costs.activation_bytes else 0
            if kind == "F" and KINDS[schedule.kind].has_backward:
                live += size
            elif kind == "W" or (kind == "B" and stage not in split):
                live -= size
            peak = max(peak, live)
        peaks.append(static + peak)
    return tuple(peaks)


def count_live(schedule: Schedule) -> tuple[int, ...]:
    """Return for each stage the most micro-batches whose activations are alive at once; 1 if nothing is kept for a
    backward."""
    live: Counter[int] = Counter()
    peak: Counter[int] = Counter()
    for action in schedule.order:
        live[action.stage] += {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
        peak[action.stage] = max(peak[action.stage], live[action.stage])
    return tuple(peak[s] if KINDS[schedule.kind].has_backward else 1 for s in range(schedule.num_stages))
