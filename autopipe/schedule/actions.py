"""A schedule as plain values: for each rank a list of actions, in torch's spelling."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self, get_args

from autopipe.errors import ScheduleError

Kind = Literal["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "REDUCE_GRAD"]
COMPUTES = ("F", "B", "I", "W")
RECEIVE_OF: dict[Kind, Kind] = {"SEND_F": "RECV_F", "SEND_B": "RECV_B"}
SEND_OF: dict[Kind, Kind] = {"RECV_F": "SEND_F", "RECV_B": "SEND_B"}

_SPELLING = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|REDUCE_GRAD|F|B|I|W)(\d+)(?:>(\d+))?")


@dataclass(frozen=True, slots=True)
class Action:
    """One step of a rank.

    Attributes:
        kind: F forward, B whole backward, I backward of the inputs, W backward of the weights, a send or a receive of
            an activation (`_F`) or of a gradient (`_B`), or the sum of the gradients of tied parameters.
        stage: the stage of this rank that acts.
        microbatch: the micro-batch; of a REDUCE_GRAD, the index of the reduction group.
        peer: the stage at the other end of a send or a receive, -1 for the other kinds.
    """

    kind: Kind
    stage: int
    microbatch: int
    peer: int = -1

    def __str__(self) -> str:
        """The spelling of `torch.distributed.pipelining`, the peer after `>`: `0F3`, `0SEND_F3>2`."""
        peer = f">{self.peer}" if self.peer >= 0 else ""
        return f"{self.stage}{self.kind}{self.microbatch}{peer}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse an action from the text that `str()` writes.

        Raises:
            ScheduleError: the text is not an action.
        """
        match = _SPELLING.fullmatch(text)
        if match is None or (match[4] is not None) != ("_" in match[2] and match[2] != "REDUCE_GRAD"):
            raise ScheduleError(
                f"action {text!r}",
                expected="stage, kind, micro-batch and, of a transfer, > and the peer stage",
                remedy="write it like 0F3 or 0SEND_F3>2",
            )
        kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
        return cls(kinds[match[2]], int(match[1]), int(match[3]), -1 if match[4] is None else int(match[4]))

    @property
    def matching(self) -> Action:
        """The action at the other end of a send or a receive."""
        kind = RECEIVE_OF.get(self.kind) or SEND_OF[self.kind]
        return Action(kind, self.peer, self.microbatch, self.stage)


@dataclass(frozen=True, slots=True, order=True)
class Edge:
    """A directed edge of the stage graph: `source` < `target`; skips over stages are allowed.

    One send and one receive for each micro-batch move all the tensors of the edge. `backward` is false if no
    gradient comes back.
    """

    source: int
    target: int
    backward: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The actions of every rank, all taken from one global order.

    Attributes:
        kind: `1f1b`, `eager-1f1b`, `gpipe`, `interleaved`, `zb-h1` or `forward`.
        num_stages, num_microbatches: K and M; stage s runs on rank s modulo the number of ranks.
        edges: the stage graph.
        reductions: groups of stages that hold the same tied parameter.
        actions: for each rank, what it issues, in order.
        order: the one topological order that the ranks' lists are restrictions of. A transfer stands in it once, as its
            send, and a reduction once, under its first stage.
    """

    kind: str
    num_stages: int
    num_microbatches: int
    edges: tuple[Edge, ...]
    reductions: tuple[tuple[int, ...], ...]
    actions: tuple[tuple[Action, ...], ...]
    order: tuple[Action, ...]

    @property
    def num_ranks(self) -> int:
        """Number of ranks, at most the number of stages."""
        return len(self.actions)

    def rank_of(self, stage: int) -> int:
        """The rank on which a stage runs."""
        return stage % len(self.actions)

    def is_local(self, edge: Edge) -> bool:
        """Return whether both ends run on one rank, so that nothing is sent."""
        return self.rank_of(edge.source) == self.rank_of(edge.target)

    def describe(self) -> str:
        """One line for each rank, in torch's spelling."""
        return "\n".join(f"rank {rank}: {' '.join(map(str, actions))}" for rank, actions in enumerate(self.actions))


def restrict(
    order: tuple[Action, ...], num_ranks: int, reductions: tuple[tuple[int, ...], ...]
) -> tuple[tuple[Action, ...], ...]:
    """Each rank's share of a global order: a transfer is a send on one rank and a receive on another."""
    lists: list[list[Action]] = [[] for _ in range(num_ranks)]
    for event in order:
        for action in sides(event, num_ranks, reductions):
            lists[action.stage % num_ranks].append(action)
    return tuple(tuple(actions) for actions in lists)


def sides(event: Action, num_ranks: int, reductions: tuple[tuple[int, ...], ...]) -> Iterator[Action]:
    """The actions of an event of the global order: one on each rank that takes part in it."""
    if event.kind in RECEIVE_OF:
        yield event
        yield event.matching
    elif event.kind == "REDUCE_GRAD":
        seen: set[int] = set()
        for stage in sorted(reductions[event.microbatch]):
            if stage % num_ranks not in seen:
                seen.add(stage % num_ranks)
                yield Action("REDUCE_GRAD", stage, event.microbatch)
    else:
        yield event
