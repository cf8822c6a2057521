"""The problem and the solution of the planner's searches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from autopipe.cost import CostGraph, IntArray
from autopipe.partition.constraints import Rules
from autopipe.partition.memory.model import MemoryModel

GRID_POSITIONS = 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """An assignment of nodes to stages, its largest load, and an order of which its stages are intervals."""

    load_us: float
    stage_of: IntArray
    order: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The split to find: a graph into K stages, each within the memory of its device, as the rules say.

    `with_recompute` gives the graph with its classes of recompute where the caller has ruled them out: for an error's
    remedy.
    """

    graph: CostGraph
    num_stages: int
    memory: MemoryModel
    rules: Rules = field(default_factory=Rules)
    with_recompute: Callable[[], CostGraph] | None = None

    @property
    def positions(self) -> int:
        """The most positions of a grid: all of a graph of ordinary size."""
        return max(GRID_POSITIONS, 8 * self.num_stages)
