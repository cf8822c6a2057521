"""The schedules: one row each, with every fact that the planner, the engine, the exports and the command line need.

To add a schedule, write its generator in `orders.py` and its row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autopipe.schedule.orders import (
    Orders,
    eager_one_forward_one_backward,
    eager_warm_up,
    forward_only,
    gpipe,
    interleaved,
    interleaved_warm_up,
    one_forward_one_backward,
    zero_bubble_h1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleKind:
    """The facts of one schedule. K stages, M micro-batches, P ranks.

    Attributes:
        name: as users write it.
        orders: (K, M, P) to the computes of each rank, in order.
        live: (K, M, P, rank) to the most activations that a rank holds at once, in micro-batches of one stage.
        several_stages_a_rank: K may be larger than P; stage s is on rank s mod P. Otherwise K = P.
        divides_backward: a backward is computed in two parts, I and W; otherwise as one, B. A stage that computes
            activations again, or is compiled, cannot be divided.
        has_backward: false for evaluation, which no plan is made for.
        planned_for: the planner optimises cuts for it; plans of other schedules are cut for 1F1B and played under
            theirs.
        tried_by_auto: `schedule="auto"` considers it. Of schedules that are equally fast the first row is taken.
        torchtitan: its name in torchtitan; None: not there.
        deepspeed: DeepSpeed's pipeline engine runs it.
        torch: the class in `torch.distributed.pipelining` that runs it; None: an exported script takes the nearest.
    """

    name: str
    orders: Callable[[int, int, int], Orders]
    live: Callable[[int, int, int, int], int]
    several_stages_a_rank: bool
    divides_backward: bool
    has_backward: bool
    planned_for: bool
    tried_by_auto: bool
    torchtitan: str | None
    deepspeed: bool
    torch: str | None

    def fits(self, num_stages: int, num_ranks: int) -> bool:
        """Return whether it can deal these stages over these ranks."""
        return num_stages > num_ranks if self.several_stages_a_rank else num_stages == num_ranks


def _every_forward(num_stages: int, num_microbatches: int, num_ranks: int, rank: int) -> int:
    return num_microbatches * len(range(rank, num_stages, num_ranks))


ONE_FORWARD_ONE_BACKWARD = ScheduleKind(
    name="1f1b",
    orders=one_forward_one_backward,
    live=lambda K, M, P, rank: min(K - rank, M),
    several_stages_a_rank=False,
    divides_backward=False,
    has_backward=True,
    planned_for=True,
    tried_by_auto=True,
    torchtitan="1F1B",
    deepspeed=True,
    torch="Schedule1F1B",
)
GPIPE = ScheduleKind(
    name="gpipe",
    orders=gpipe,
    live=_every_forward,
    several_stages_a_rank=False,
    divides_backward=False,
    has_backward=True,
    planned_for=True,
    tried_by_auto=False,  # it is never faster than 1F1B, and holds more
    torchtitan="GPipe",
    deepspeed=False,
    torch="ScheduleGPipe",
)
EAGER_ONE_FORWARD_ONE_BACKWARD = ScheduleKind(
    name="eager-1f1b",
    orders=eager_one_forward_one_backward,
    live=lambda K, M, P, rank: eager_warm_up(K, M, rank),
    several_stages_a_rank=False,
    divides_backward=False,
    has_backward=True,
    planned_for=False,
    tried_by_auto=True,
    torchtitan=None,
    deepspeed=False,
    torch=None,
)
ZERO_BUBBLE_H1 = ScheduleKind(
    name="zb-h1",
    orders=zero_bubble_h1,
    live=lambda K, M, P, rank: min(K, M),
    several_stages_a_rank=False,
    divides_backward=True,
    has_backward=True,
    planned_for=False,
    tried_by_auto=True,
    torchtitan=None,
    deepspeed=False,
    torch=None,
)
INTERLEAVED = ScheduleKind(
    name="interleaved",
    orders=interleaved,
    live=interleaved_warm_up,
    several_stages_a_rank=True,
    divides_backward=False,
    has_backward=True,
    planned_for=False,
    tried_by_auto=True,
    torchtitan="Interleaved1F1B",
    deepspeed=False,
    torch="ScheduleInterleaved1F1B",
)
FORWARD_ONLY = ScheduleKind(
    name="forward",
    orders=forward_only,
    live=_every_forward,
    several_stages_a_rank=True,
    divides_backward=False,
    has_backward=False,
    planned_for=False,
    tried_by_auto=False,
    torchtitan=None,
    deepspeed=False,
    torch=None,
)

KINDS = {
    kind.name: kind
    for kind in (
        ONE_FORWARD_ONE_BACKWARD,
        GPIPE,
        EAGER_ONE_FORWARD_ONE_BACKWARD,
        ZERO_BUBBLE_H1,
        INTERLEAVED,
        FORWARD_ONLY,
    )
}
"""Every schedule by its name, the simplest first."""

DEFAULT = ONE_FORWARD_ONE_BACKWARD.name
FORWARD = FORWARD_ONLY.name
TRAINING = tuple(kind.name for kind in KINDS.values() if kind.has_backward)
"""Schedules that a plan may be run under."""
PLANNED = tuple(kind.name for kind in KINDS.values() if kind.planned_for)
"""Schedules that the planner optimises for."""
TRIED = tuple(kind.name for kind in KINDS.values() if kind.tried_by_auto)
"""Schedules that `auto` chooses from, simplest first."""
SEVERAL_STAGES_A_RANK = tuple(kind.name for kind in KINDS.values() if kind.several_stages_a_rank)


def undivided(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the schedules that compute a backward as a whole."""
    return tuple(name for name in names if not KINDS[name].divides_backward)


def dealt_over_ranks() -> str:
    """The schedules that can put several stages on a rank, for a message."""
    return " or ".join(name for name in TRAINING if KINDS[name].several_stages_a_rank)
