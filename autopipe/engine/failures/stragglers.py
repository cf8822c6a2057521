"""Finds the rank that keeps the others waiting, from what all ranks report; warns once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SLOW_FACTOR = 2.0
SLOW_AFTER_S = 1.0
SLOW_EXCESS_US = 20e3
"""Extra time of a micro-batch from which a warning is due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPhase:
    """Phase of a rank.

    Attributes:
        stage: its stage; None before the model is placed.
        phase: what it is doing, in words.
        waiting: it waits for another rank.
        for_s: for so long.
        usual_s: what this takes otherwise; None where it has not been done often enough to tell.
        serial: counts the phases, so that two of the same words are told apart.
    """

    stage: int | None
    phase: str
    waiting: bool
    for_s: float
    usual_s: float | None
    serial: int

    @property
    def factor(self) -> float:
        """Factor over the usual time."""
        return self.for_s / self.usual_s if self.usual_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Time of a stage for the forward and backward of one micro-batch, measured over the last steps and as planned,
    in microseconds."""

    stage: int
    measured_us: float
    planned_us: float


class StragglerDetector:
    """Remembers what was said, so that it is said once."""

    def __init__(self) -> None:
        self._said: dict[int, tuple[int, float]] = {}
        self._slow_before: set[tuple[int, int]] = set()
        self._said_pace: set[tuple[int, int]] = set()

    def of_places(self, places: Mapping[int, RankPhase]) -> list[str]:
        """Warnings for ranks that have long been at something that is short otherwise, while others wait."""
        waiting = sorted(r for r, p in places.items() if p.waiting and p.for_s >= SLOW_AFTER_S)
        warnings = []
        for rank, place in places.items():
            if place.waiting or place.for_s < SLOW_AFTER_S or place.factor < SLOW_FACTOR or not waiting:
                continue
            serial, said_s = self._said.get(rank, (-1, 0.0))
            if place.serial == serial and place.for_s < 4 * said_s:
                continue
            self._said[rank] = place.serial, place.for_s
            who = (
                "rank " + ", ".join(map(str, waiting)) if len(waiting) == 1 else "ranks " + ", ".join(map(str, waiting))
            )
            warnings.append(
                f"stage {place.stage} on rank {rank} is slow: {place.phase} takes {place.for_s:.1f} s so far, "
                f"{place.factor:.0f} times as long as usual; {who} {'waits' if len(waiting) == 1 else 'wait'}"
            )
        return warnings

    def of_paces(self, paces: Sequence[tuple[int, Pace]]) -> list[str]:
        """Warnings for stages that are slower against their plan than the others are against theirs, twice running.

        Args:
            paces: ranks, and the pace of a stage there.
        """
        paces = [(r, p) for r, p in paces if p.planned_us > 0]
        slow, warnings = set(), []
        for place, (rank, pace) in enumerate(paces):
            others = [p.measured_us / p.planned_us for i, (_, p) in enumerate(paces) if i != place]
            if not others:
                continue
            expected_us = statistics.median_low(others) * pace.planned_us
            if pace.measured_us < max(SLOW_FACTOR * expected_us, expected_us + SLOW_EXCESS_US):
                continue
            key = rank, pace.stage
            slow.add(key)
            if key in self._slow_before and key not in self._said_pace:
                self._said_pace.add(key)
                warnings.append(
                    f"stage {pace.stage} on rank {rank} is slow: {pace.measured_us / 1e3:.0f} ms a micro-batch "
                    "where its plan "
                    f"and the pace of the other stages give {expected_us / 1e3:.0f} ms, "
                    f"{pace.measured_us / expected_us:.1f} times as long"
                )
        self._said_pace &= slow
        self._slow_before = slow
        return warnings
