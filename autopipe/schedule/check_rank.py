"""Check one rank's list: the order of uses, the posted receives and the live activations."""

from __future__ import annotations

from collections import defaultdict

from autopipe.errors import ScheduleError
from autopipe.schedule.actions import RECEIVE_OF, SEND_OF, Action, Kind, Schedule
from autopipe.schedule.event_graph import MAX_POSTED_RECEIVES, StageFlow, flows_of_edges, phase
from autopipe.schedule.kinds import KINDS

REMEDY = "make the schedule with autopipe.schedule.build_schedule, with the same arguments on every rank"


def fault(got: str, expected: str, where: str) -> ScheduleError:
    """Return the error of a faulty schedule."""
    return ScheduleError(got, expected=expected, where=where, remedy=REMEDY)


def flows_of(schedule: Schedule) -> list[StageFlow]:
    """The flows of a schedule's stage graph, those between stages of one rank included."""
    return flows_of_edges(schedule.edges, not KINDS[schedule.kind].has_backward)


def live_bound(schedule: Schedule, rank: int) -> int:
    """The most activations that a rank may hold at once, counted in micro-batches of one stage."""
    K, M = schedule.num_stages, schedule.num_microbatches
    return KINDS[schedule.kind].live(K, M, schedule.num_ranks, rank)


def check_rank(schedule: Schedule, rank: int) -> None:
    """Check what a rank's list must satisfy by itself.

    Raises:
        ScheduleError: a tensor is used before it is received or sent before it is made, a backward comes before its
            forward, too many receives wait for their compute, or too many activations are alive.
    """
    walk = _Walk(schedule, rank)
    for action in schedule.actions[rank]:
        if action.kind in SEND_OF:
            walk.post(action)
        elif action.kind in RECEIVE_OF:
            walk.send(action)
        elif action.kind != "REDUCE_GRAD":
            walk.compute(action)


class _Walk:
    """The tensors that are there after each action of a rank's list."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.rank, self.forward_only = rank, not KINDS[schedule.kind].has_backward
        self.local: dict[tuple[Kind | None, int], list[StageFlow]] = defaultdict(list)
        self.inward: dict[tuple[Kind | None, int], list[StageFlow]] = defaultdict(list)
        for flow in flows_of(schedule):
            same_rank = schedule.rank_of(flow[1]) == schedule.rank_of(flow[2])
            (self.local if same_rank else self.inward)[flow[0], flow[2]].append(flow)
        self.posted: dict[StageFlow, set[int]] = defaultdict(set)
        self.computed: set[tuple[Kind | None, int, int]] = set()
        self.live, self.bound = 0, live_bound(schedule, rank)

    def fault(self, got: str, expected: str, action: Action) -> ScheduleError:
        return fault(got, expected, f"rank {self.rank}, {action}")

    def post(self, action: Action) -> None:
        waiting = self.posted[SEND_OF[action.kind], action.peer, action.stage]
        waiting.add(action.microbatch)
        if len(waiting) > MAX_POSTED_RECEIVES:
            raise self.fault(f"{len(waiting)} receives posted", f"at most {MAX_POSTED_RECEIVES} ahead of use", action)

    def send(self, action: Action) -> None:
        if (action.kind, action.stage, action.microbatch) not in self.computed:
            raise self.fault("a send before its tensor is computed", "the compute first", action)

    def compute(self, action: Action) -> None:
        kind, stage, microbatch = action.kind, action.stage, action.microbatch
        if kind == "W" and ("SEND_B", stage, microbatch) not in self.computed:
            raise self.fault("weight gradients before the gradient of the inputs", "I before W", action)
        if kind in ("B", "I") and ("SEND_F", stage, microbatch) not in self.computed:
            raise self.fault("a backward before its forward", "F first", action)
        for flow in self.inward[phase(kind), stage]:
            if microbatch not in self.posted[flow]:
                raise self.fault(f"a use before the receive from stage {flow[1]}", "the receive first", action)
            self.posted[flow].discard(microbatch)
        for made, source, _ in self.local[phase(kind), stage]:
            if (made, source, microbatch) not in self.computed:
                raise self.fault(f"a use before stage {source} of this rank made it", "its compute first", action)
        if kind != "W":
            self.computed.add((phase(kind), stage, microbatch))
        self.live += {"F": 1, "I": 0}.get(kind, -1)
        if self.live > self.bound and not self.forward_only:
            raise self.fault(f"{self.live} live activations", f"at most {self.bound}", action)
