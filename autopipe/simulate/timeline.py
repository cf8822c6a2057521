"""Timeline of a step: the same record for a simulated and for a measured one."""

from __future__ import annotations

from dataclasses import dataclass

from autopipe.schedule.actions import Kind


@dataclass(frozen=True, slots=True)
class Event:
    """One compute, transfer or reduction.

    Attributes:
        rank: the rank on which it ran; of a transfer, the sending rank.
        kind, stage, microbatch, peer: as in `Action`.
        start_us, end_us: from the start of the step, in microseconds; of a transfer, how long it held the link.
    """

    rank: int
    kind: Kind
    stage: int
    microbatch: int
    peer: int
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A step, event by event.

    Attributes:
        events: in the order in which they were issued.
        makespan_us: from the start of the step to the end of its last event.
        bubble: for each rank, the share of the makespan in which it does not compute, from 0 to 1.
        peak_bytes: for each rank, the most memory that it holds; zeros if sizes are not known.
    """

    events: tuple[Event, ...]
    makespan_us: float
    bubble: tuple[float, ...]
    peak_bytes: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return len(self.bubble)

    @property
    def mean_bubble(self) -> float:
        """The share of the time of all ranks in which they do not compute."""
        return sum(self.bubble) / len(self.bubble)
