"""Prove that a schedule loses nothing, uses nothing too early and is free of deadlock.

Deadlock is judged under the strictest reading: a send blocks until its receive is reached, and each rank has one queue
for computes and transfers alike. If the lists run to their end under this reading, the order in which they ran is a
topological order that every list follows, so that under any wider reading (a queue for each rank, rank pair or edge)
the earliest unfinished event of that order is always enabled, and the schedule ends too.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from autopipe.schedule.actions import COMPUTES, RECEIVE_OF, SEND_OF, Action, Kind, Schedule, restrict, sides
from autopipe.schedule.check_rank import check_rank, fault, flows_of
from autopipe.schedule.event_graph import StageFlow
from autopipe.schedule.kinds import KINDS


def check_schedule(schedule: Schedule) -> None:
    """Prove a schedule, in time linear in its number of actions.

    Proved: every compute runs once, a backward after its forward; every tensor is sent once and received once, in the
    same sequence at both ends of an edge; nothing is used before it arrives; at most two receives of an edge wait for
    their compute; live activations stay within the bound of the schedule's kind; each reduction follows the last
    backward; no deadlock under blocking sends and any layout of first-in-first-out queues; the lists are restrictions
    of the one global order.

    Raises:
        ScheduleError: the first fault found, with the rank and the action.
    """
    _check_computes(schedule)
    _check_transfers(schedule)
    for rank in range(schedule.num_ranks):
        check_rank(schedule, rank)
    _check_reductions(schedule)
    _check_deadlock(schedule)
    if restrict(schedule.order, schedule.num_ranks, schedule.reductions) != schedule.actions:
        raise fault("lists that differ from the global order", "each list a restriction of it", "Schedule.order")


def _check_computes(schedule: Schedule) -> None:
    counts = Counter((a.kind, a.stage, a.microbatch) for actions in schedule.actions for a in actions)
    facts = KINDS[schedule.kind]
    kinds: tuple[Kind, ...] = ("F", "I", "W") if facts.divides_backward else ("F", "B")
    kinds = kinds if facts.has_backward else ("F",)
    wanted = {(k, s, m) for k in kinds for s in range(schedule.num_stages) for m in range(schedule.num_microbatches)}
    for key in sorted(wanted):
        if counts[key] != 1:
            raise fault(f"{Action(*key)} {counts[key]} times", "every compute once", f"stage {key[1]}")
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action.kind in COMPUTES and (action.kind, action.stage, action.microbatch) not in wanted:
                raise fault(f"{action}", "computes of this schedule only", f"rank {rank}")
            if schedule.rank_of(action.stage) != rank:
                raise fault(f"{action}", f"rank {schedule.rank_of(action.stage)}", f"rank {rank}")


def _check_transfers(schedule: Schedule) -> None:
    sent: dict[StageFlow, list[int]] = defaultdict(list)
    received: dict[StageFlow, list[int]] = defaultdict(list)
    for actions in schedule.actions:
        for a in actions:
            if a.kind in RECEIVE_OF:
                sent[a.kind, a.stage, a.peer].append(a.microbatch)
            elif a.kind in SEND_OF:
                received[SEND_OF[a.kind], a.peer, a.stage].append(a.microbatch)
    flows = {f for f in flows_of(schedule) if schedule.rank_of(f[1]) != schedule.rank_of(f[2])}
    for flow in sorted(flows | sent.keys() | received.keys()):
        where = f"{flow[0]} from stage {flow[1]} to {flow[2]}"
        if flow not in flows:
            raise fault("a transfer", "none: the stage graph has no such edge", where)
        for done, microbatches in (("sent", sent[flow]), ("received", received[flow])):
            counts = Counter(microbatches)
            for m in range(schedule.num_microbatches):
                if counts[m] != 1:
                    raise fault(f"micro-batch {m} {done} {counts[m]} times", "once", where)
            if len(counts) > schedule.num_microbatches:
                raise fault(f"micro-batch {max(counts)} {done}", f"{schedule.num_microbatches} of them", where)
        if sent[flow] != received[flow]:
            first = next(i for i, (s, r) in enumerate(zip(sent[flow], received[flow], strict=True)) if s != r)
            got = f"micro-batch {sent[flow][first]} sent and {received[flow][first]} received as number {first}"
            raise fault(got, "the same sequence at both ends", where)


def _check_reductions(schedule: Schedule) -> None:
    if not KINDS[schedule.kind].has_backward and schedule.reductions:
        raise fault("gradient reductions", "none in a forward-only schedule", "Schedule.reductions")
    wanted = {
        action
        for group, stages in enumerate(schedule.reductions)
        for action in sides(Action("REDUCE_GRAD", stages[0], group), schedule.num_ranks, schedule.reductions)
    }
    for rank, actions in enumerate(schedule.actions):
        last = {a.stage: i for i, a in enumerate(actions) if a.kind in ("B", "I", "W")}
        found = Counter(a for a in actions if a.kind == "REDUCE_GRAD")
        for action in sorted((a for a in wanted if schedule.rank_of(a.stage) == rank), key=lambda a: a.microbatch):
            if found.pop(action, 0) != 1:
                raise fault(f"not one {action}", "one in the list of every member", f"rank {rank}")
            members = [s for s in schedule.reductions[action.microbatch] if schedule.rank_of(s) == rank]
            if actions.index(action) < max(last[s] for s in members):
                raise fault(f"{action} before the last backward", "the last backward first", f"rank {rank}")
        if found:
            raise fault(f"{next(iter(found))}", "reductions of this schedule only", f"rank {rank}")


def _check_deadlock(schedule: Schedule) -> None:
    """Play the lists with a queue per rank and blocking sends: an event runs when all its ranks have reached it."""
    position = [0] * schedule.num_ranks
    runnable = list(range(schedule.num_ranks))
    while runnable:
        rank = runnable.pop()
        while position[rank] < len(schedule.actions[rank]):
            action = schedule.actions[rank][position[rank]]
            event = action.matching if action.kind in SEND_OF else action
            parts = list(sides(event, schedule.num_ranks, schedule.reductions))
            ranks = [schedule.rank_of(part.stage) for part in parts]
            if any(_head(schedule, position, r) != part for r, part in zip(ranks, parts, strict=True)):
                break
            for r in ranks:
                position[r] += 1
            runnable += [r for r in ranks if r != rank]
    stuck = [r for r in range(schedule.num_ranks) if position[r] < len(schedule.actions[r])]
    if stuck:
        waits = ", ".join(f"rank {r} in {_head(schedule, position, r)}" for r in stuck)
        raise fault(f"a circular wait: {waits}", "an order in which every action can run", "Schedule.actions")


def _head(schedule: Schedule, position: list[int], rank: int) -> Action | None:
    actions = schedule.actions[rank]
    return actions[position[rank]] if position[rank] < len(actions) else None
