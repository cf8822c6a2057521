"""What a stage holds between and within its computes: its nodes are gone through in the order of their backwards.

While the backward of a node runs, there are the storages that it or a node before it keeps, its workspace, the gradients of values
that a later node has read and an earlier one has made, and in the first backward of a step, the gradients of parameters that
later nodes have made. What comes into the stage and what leaves it is there throughout, since the engine holds both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import CostGraph, FloatArray, IntArray
from autopipe.partition.memory import StageMemory
from autopipe.partition.storages import Storages
from profiler.records import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class StageHold:
    """What one stage holds, in bytes.

    Attributes:
        static_bytes: parameters, buffers and optimizer state.
        gradient_bytes: gradients of its parameters.
        held_bytes: what a micro-batch keeps from its forward to its backward.
        first_bytes: the most during the first backward, its own micro-batch and the gradients that appear counted.
        later_bytes: the most during a later one, its own micro-batch counted and gradients of parameters not.
    """

    static_bytes: float
    gradient_bytes: float
    held_bytes: float
    first_bytes: float
    later_bytes: float


class Values(Storages):
    """The nodes of a profile with what flows between them.

    Attributes:
        workspace: (N) `workspace_bytes` of each node.
        gradient: (N) bytes of the gradient of each node's output; 0 where there is none.
        source, target: pairs of a node and one that reads its output.
    """

    def __init__(self, profile: Profile, graph: CostGraph) -> None:
        super().__init__(profile)
        self._graph, self._node_of = graph, graph.node_of()
        nodes = profile.nodes
        index = {node.name: i for i, node in enumerate(nodes)}
        self.workspace = np.array([node.workspace_bytes for node in nodes], float)
        self.gradient = np.array([node.output_bytes if node.differentiable else 0 for node in nodes], float)
        reads = sorted({(index[name], i) for i, node in enumerate(nodes) for name in node.inputs})
        self.source, self.target = np.array(reads, np.int64).reshape(-1, 2).T

    def on(self, stage_of: IntArray, stage: int) -> NDArray[np.bool_]:
        """(N) which nodes an assignment `stage_of` (n) of the graph's nodes puts on a stage."""
        return np.asarray(stage_of[self._node_of] == stage)

    def param_gradients(self, mine: NDArray[np.bool_]) -> FloatArray:
        """(N) bytes of the gradients of parameters that each of some nodes is the first to make in a backward."""
        graph, readers = self._graph, self._graph.param_readers
        inside = np.array([mine[members[-1]] for members in graph.members])[readers.node]
        latest = np.full(len(graph.param_bytes), -1)
        np.maximum.at(latest, readers.owner[inside], readers.node[inside])
        found = np.zeros(len(mine))
        for param in np.flatnonzero(latest >= 0):
            found[graph.members[latest[param]][-1]] += graph.param_bytes[param] * graph.trainable[param]
        return found


def stage_hold(values: Values, parts: StageMemory, stage_of: IntArray, stage: int, received: float) -> StageHold:
    """What a stage holds under an assignment `stage_of` (n) of the graph's nodes.

    Args:
        parts: `stage_memory` of the same assignment.
        received: bytes that the stage receives in the forward of a micro-batch.
    """
    mine = values.on(stage_of, stage)
    nodes = np.flatnonzero(mine)
    place = np.full(len(mine), -1)
    place[nodes] = np.arange(len(nodes))
    leaving = np.unique(values.source[mine[values.source] & ~mine[values.target]])
    kept = received + _kept(values, mine, place, leaving)
    inside = mine[values.target]
    last = np.full(len(mine), -1)
    np.maximum.at(last, values.source[inside], place[values.target[inside]])
    # A gradient is there between the nodes that read its value and the one that made it: + at first + 1, - at last.
    change = np.zeros(len(nodes) + 1)
    alive = last > place + 1
    np.add.at(change, place[alive] + 1, values.gradient[alive])
    np.add.at(change, last[alive], -values.gradient[alive])
    within = kept + np.cumsum(change)[:-1] + values.workspace[nodes]
    # The gradient of what leaves and is read by nobody here has come as a message; the workspace of its node counts it too.
    alone = leaving[last[leaving] < 0]
    within[place[alone]] -= values.gradient[alone]
    made = values.param_gradients(mine)[nodes]
    return StageHold(
        static_bytes=float(parts.param_bytes[stage] + parts.optimizer_bytes[stage]),
        gradient_bytes=float(parts.gradient_bytes[stage]),
        held_bytes=float(kept[-1]),
        first_bytes=float((within + np.cumsum(made[::-1])[::-1] - made).max()),
        later_bytes=float(within.max()),
    )


def _kept(values: Values, mine: NDArray[np.bool_], place: IntArray, leaving: IntArray) -> FloatArray:
    """(nodes of the stage) bytes of storages made in the stage that are there during the backward of each node."""
    count = int(mine.sum())
    first = np.full(len(mine), count)
    pairs = mine[values.kept] & mine[values.keeper]
    np.minimum.at(first, values.kept[pairs], place[values.keeper[pairs]])
    first[[owner for node in leaving for owner in values.owners[node]]] = 0
    change = np.zeros(count + 1)
    np.add.at(change, first[mine], values.size[mine])
    np.add.at(change, place[mine], values.inner[mine])
    return np.asarray(np.cumsum(change)[:-1], np.float64)
