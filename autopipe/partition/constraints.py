"""Demands on a split beyond its cost: modules that stay together, or stand alone, first or last.

`together` and `alone` make one node of the cost graph out of a module's nodes. `Rules` says what the rest demands of
down-sets:

    first: in D_1        last: in no D_k for k < K        alone: the only node of its stage
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import CostGraph, IntArray
from autopipe.errors import PartitionError
from autopipe.partition.graph.orders import by_priority
from profiler.records import Profile

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """Demands on a split, by the FQNs of submodules (or names of nodes of the profile).

    Attributes:
        together: lists of modules; those of a list are on one stage, with all that lies between them.
        alone: modules that each are a stage of their own.
        first, last: modules on the first and on the last stage.
    """

    together: Sequence[Sequence[str]] = ()
    alone: Sequence[str] = ()
    first: Sequence[str] = ()
    last: Sequence[str] = ()

    def one_at_a_time(self) -> Iterator[tuple[str, Constraints]]:
        """Each demand in words, and the other demands."""
        for kind in ("together", "alone", "first", "last"):
            demands = getattr(self, kind)
            for i, demand in enumerate(demands):
                words = f"{kind} {demand if isinstance(demand, str) else ', '.join(demand)}"
                yield words, dataclasses.replace(self, **{kind: [*demands[:i], *demands[i + 1 :]]})

    def groups(self, profile: Profile) -> list[list[str]]:
        """Names of nodes that become one node of the cost graph."""
        parts = [*self.together, *([name] for name in self.alone)]
        return [
            [profile.nodes[i].name for name in part for i in nodes_of(profile, name, "constraints")] for part in parts
        ]

    def rules(self, profile: Profile, graph: CostGraph, num_stages: int) -> Rules:
        """The demands on the nodes of a graph that was built with `groups`.

        Raises:
            PartitionError: a name that is not there, or demands that contradict one another.
        """
        node_of = graph.node_of()
        nodes = {
            kind: {name: node_of[nodes_of(profile, name, "constraints")] for name in getattr(self, kind)}
            for kind in ("alone", "first", "last")
        }
        rules = Rules(**{k: np.unique(np.concatenate([[], *v.values()])).astype(np.int64) for k, v in nodes.items()})
        for name, (v, *_) in nodes["alone"].items():
            strangers = set(graph.members[v]) - set(nodes_of(profile, name, "constraints"))
            if strangers:
                raise _contradiction(
                    f"{name!r} alone, but {profile.nodes[min(strangers)].name!r} cannot be cut from it",
                    "it lies between nodes of the module, writes to the same memory, or is to stay with it",
                )
        ahead, behind = graph.closure(rules.first, graph.predecessors), graph.closure(rules.last, graph.successors)
        if num_stages > 1 and (ahead & behind).any():
            v = graph.members[int(np.flatnonzero(ahead & behind)[0])][0]
            raise _contradiction(
                f"{', '.join(self.first)} first and {', '.join(self.last)} last",
                f"{profile.nodes[v].name!r} would be on both stages",
            )
        for name, (v, *_) in nodes["alone"].items():
            if (ahead[v] and ahead.sum() > 1) or (behind[v] and behind.sum() > 1):
                raise _contradiction(f"{name!r} alone", "the first or the last stage must hold it beside other nodes")
        return rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Nodes of a cost graph that must be on the first stage, on the last one, and alone on theirs."""

    first: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    last: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    alone: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def any(self) -> bool:
        """Whether anything is demanded."""
        return bool(len(self.first) or len(self.last) or len(self.alone))

    def arranged(self, graph: CostGraph, order: IntArray) -> IntArray:
        """The order with all that must be on the first stage at its start, on the last at its end: no split is lost."""
        if not (len(self.first) or len(self.last)):
            return order
        n = graph.num_nodes
        rank = graph.closure(self.last, graph.successors).astype(float) - graph.closure(self.first, graph.predecessors)
        position = np.empty(n)
        position[order] = np.arange(n)
        return np.array(by_priority(graph.successors, graph.predecessors, (rank * n + position).tolist()), np.int64)

    def broken(self, stage_of: IntArray, num_stages: int) -> bool:
        """Whether an assignment does not do what is demanded."""
        size = np.bincount(stage_of, minlength=num_stages)
        first, last = stage_of[self.first], stage_of[self.last]
        return bool((first > 0).any() or (last < num_stages - 1).any() or (size[stage_of[self.alone]] > 1).any())

    def places(self, position: IntArray) -> IntArray:
        """Positions of an order between which an interval may be alone: cuts must be allowed there."""
        return np.concatenate([position[self.alone], position[self.alone] + 1])

    def forbidden(self, position: IntArray, start: IntArray, end: IntArray, stage: int, num_stages: int) -> BoolArray:
        """(starts, ends) intervals [i, j) of an order that cannot be stage k of K."""
        wrong = np.zeros((len(start), len(end)), bool)
        if len(self.first):
            final = int(position[self.first].max())
            wrong |= (end <= final)[None, :] if stage == 0 else (start <= final)[:, None]
        if len(self.last):
            begin = int(position[self.last].min())
            wrong |= (start > begin)[:, None] if stage == num_stages - 1 else (end > begin)[None, :]
        for p in position[self.alone].tolist():
            wrong |= ((start <= p)[:, None] & (end > p)[None, :]) & ((end[None, :] - start[:, None]) > 1)
        return wrong


def nodes_of(profile: Profile, name: str, where: str) -> list[int]:
    """Indices of the nodes of a submodule, or of the node of this name.

    Raises:
        PartitionError: there is none.
    """
    inside = [
        i for i, node in enumerate(profile.nodes) if (node.module + ".").startswith(name + ".") or node.name == name
    ]
    if inside and name:
        return inside
    paths = (node.module.split(".") for node in profile.nodes)
    modules = {".".join(parts[:end]) for parts in paths for end in range(1, len(parts) + 1)} - {""}
    near = difflib.get_close_matches(name, sorted(modules), 3, 0.4)
    what = "split point" if where == "split_points" else "constraint"
    raise PartitionError(
        f"{what} {name!r} names no module of the graph",
        expected="the FQN of a submodule, such as one of `model.named_modules()`",
        where=where,
        remedy=f"did you mean {' or '.join(map(repr, near))}?" if near else "see the modules with `autopipe profile`",
    )


def impossible(rules: Rules, num_stages: int) -> PartitionError:
    """The error where no split into so many stages does what is demanded."""
    demands = [f"{len(v)} node{'s' * (len(v) > 1)} {k}" for k, v in dataclasses.asdict(rules).items() if len(v)]
    return PartitionError(
        f"no split into {num_stages} stages meets the constraints ({', '.join(demands)})",
        expected="constraints that a split into this many stages can meet",
        where="constraints",
        remedy="use another number of stages, or leave one of the constraints out",
    )


def _contradiction(got: str, why: str) -> PartitionError:
    return PartitionError(
        f"{got}: {why}",
        expected="constraints that do not contradict one another",
        where="constraints",
        remedy="leave one of them out",
    )
