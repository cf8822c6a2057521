"""A budget counted in work done, not in seconds on a clock: the same call gives the same plan on a busy machine too."""

from __future__ import annotations

from dataclasses import dataclass

CELL_S = 4.5e-8
"""Seconds that a cell of a dynamic program's table takes, measured on one core of a 2024 server (docs/planner.md)."""
STATE_S = 2.5e-5
"""Seconds that a down-set takes to be found, in a window of few nodes."""


@dataclass(slots=True)
class Effort:
    """Seconds of work that a search may still do, by the constants above."""

    left_s: float

    def spend(self, *, cells: float = 0.0, states: float = 0.0, seconds: float = 0.0) -> None:
        """Counts work that was done."""
        self.left_s -= cells * CELL_S + states * STATE_S + seconds

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self.left_s <= 0

    def share(self, fraction: float) -> Effort:
        """A budget of a fraction of what is left; what it spends is to be taken from this one by the caller."""
        return Effort(self.left_s * fraction)
