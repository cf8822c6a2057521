"""Costs that a schedule is played with: times of stages and links, bytes of activations, all for one micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

from autopipe.schedule.actions import Action, Edge

Link = tuple[float, float | None]
"""Times that a transfer forward and its gradient back hold the link, in microseconds; None if no gradient comes
back."""

SPLIT_SHARE = 0.08
"""Extra share of a plan's backward in two parts over one, since activations are read twice: of CPUs the least
that was measured, for devices on which nothing was."""
CPU_SPLIT_SHARE, CPU_SPLIT_NODE_US = 0.25, 20.0
"""The same on a CPU, and the time in which its graph is walked, for each node of the stage. The share differs between
machines by three times: it is that of one with a high share, so that backwards are divided only if that helps on all
(`benchmarks/engine.py divide`)."""

DEFAULT_FORWARD_US, DEFAULT_BACKWARD_US, DEFAULT_LINK_US = 1.0, 2.0, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs of one micro-batch.

    Attributes:
        forward_us, backward_us: compute time of each stage, what is not hidden of its transfers included.
        links: for each (source, target), how long a transfer holds the link, forward and back.
        activation_bytes: what each stage keeps from the forward of a micro-batch to its backward.
        static_bytes: what each stage holds all the time.
        reduce_us: time of summing the gradients of each stage over the replicas, after its last backward; empty: none.
        weight_share: the part of the backward that computes weight gradients, if the schedule splits it (I and W).
        split_us: how much longer the two parts take than the backward of a stage in one; empty: no longer.
    """

    forward_us: tuple[float, ...]
    backward_us: tuple[float, ...]
    links: Mapping[tuple[int, int], Link] = field(default_factory=lambda: MappingProxyType({}))
    activation_bytes: tuple[int, ...] = ()
    static_bytes: tuple[int, ...] = ()
    reduce_us: tuple[float, ...] = ()
    weight_share: float = 0.5
    split_us: tuple[float, ...] = ()

    @classmethod
    def default(cls, num_stages: int, edges: Iterable[Edge]) -> Self:
        """Even stages whose backward takes twice the forward, and fast links: for a schedule made without a plan."""
        return cls(
            forward_us=(DEFAULT_FORWARD_US,) * num_stages,
            backward_us=(DEFAULT_BACKWARD_US,) * num_stages,
            links={(e.source, e.target): (DEFAULT_LINK_US, DEFAULT_LINK_US) for e in edges},
        )

    def duration_us(self, action: Action) -> float:
        """Return the time a compute holds its rank or a send its link; 0 for a reduction and a link without a cost."""
        match action.kind:
            case "F":
                return self.forward_us[action.stage]
            case "B":
                return self.backward_us[action.stage]
            case "I":
                return self._divided_us(action.stage) * (1 - self.weight_share)
            case "W":
                return self._divided_us(action.stage) * self.weight_share
            case "SEND_F":
                return self.links.get((action.stage, action.peer), (0.0, 0.0))[0]
            case "SEND_B":
                return self.links.get((action.peer, action.stage), (0.0, 0.0))[1] or 0.0
            case _:
                return 0.0

    def _divided_us(self, stage: int) -> float:
        """Return the time of both parts of a stage's backward."""
        return self.backward_us[stage] + (self.split_us[stage] if self.split_us else 0.0)
