"""Bytes that a stage holds between and within its computes: its nodes are gone through in the order of their backwards.

While the backward of a node runs, there are the storages that it or a node before it keeps, its workspace, the
gradients of values that a later node has read and an earlier one has made, and in the first backward of a step, the
gradients of parameters that later nodes have made. What comes into the stage and what leaves it is there throughout,
since the engine holds both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import CostGraph, FloatArray, IntArray, param_names
from autopipe.partition.memory.model import StageMemory
from autopipe.partition.memory.storages import Storages
from profiler.records import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLiveBytes:
    """Bytes that one stage holds.

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
        hands_on: (N) whether the backward of a node makes nothing: what it hands on is the gradient that it is given.
        source, target: pairs of a node and one that reads its output.
    """

    def __init__(self, profile: Profile, graph: CostGraph) -> None:
        super().__init__(profile)
        self._node_of = graph.node_of()
        nodes = profile.nodes
        index = {node.name: i for i, node in enumerate(nodes)}
        readers: dict[str, list[int]] = {}
        for i, node in enumerate(nodes):
            for name in param_names(node):
                readers.setdefault(name, []).append(i)
        trained = zip(graph.param_names, graph.param_bytes * graph.trainable, strict=True)
        self._trained = [(np.array(readers[name]), float(num_bytes)) for name, num_bytes in trained]
        self.workspace = np.array([node.workspace_bytes for node in nodes], float)
        self.gradient = np.array([node.output_bytes if node.differentiable else 0 for node in nodes], float)
        self.hands_on = self.workspace <= self.gradient
        reads = sorted({(index[name], i) for i, node in enumerate(nodes) for name in node.inputs})
        self.source, self.target = np.array(reads, np.int64).reshape(-1, 2).T

    def on(self, stage_of: IntArray, stage: int) -> NDArray[np.bool_]:
        """(N) which nodes an assignment `stage_of` (n) of the graph's nodes puts on a stage."""
        return np.asarray(stage_of[self._node_of] == stage)

    def param_gradients(self, mine: NDArray[np.bool_]) -> FloatArray:
        """(N) bytes of the gradients of parameters that each of some nodes is the first to make in a backward."""
        found = np.zeros(len(mine))
        for readers, num_bytes in self._trained:
            if (here := readers[mine[readers]]).size:
                found[here[-1]] += num_bytes
        return found


def stage_hold(values: Values, parts: StageMemory, stage_of: IntArray, stage: int, received: float) -> StageLiveBytes:
    """Bytes that each stage holds under an assignment `stage_of` (n) of the graph's nodes.

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
    gradients = _gradients(values, mine, place, leaving)
    within = kept + gradients + values.workspace[nodes]
    made = values.param_gradients(mine)[nodes]
    return StageLiveBytes(
        static_bytes=float(parts.param_bytes[stage] + parts.optimizer_bytes[stage]),
        gradient_bytes=float(parts.gradient_bytes[stage]),
        held_bytes=float(kept[-1]),
        first_bytes=float((within + np.cumsum(made[::-1])[::-1] - made).max()),
        later_bytes=float(within.max()),
    )


def _gradients(values: Values, mine: NDArray[np.bool_], place: IntArray, leaving: IntArray) -> FloatArray:
    """(nodes of the stage) bytes of gradients of values that are there during the backward of each node, its own apart.

    A gradient is there between the nodes that read its value and the one that made it. One that has come as a message
    is counted with the messages: it is not counted again where its node's workspace does, nor where nodes hand it on as
    it is. Where a node hands one on to several values (a sum), it is counted for the first of them, which keeps it
    longest.
    """
    readers: dict[int, list[int]] = {u: [] for u in {*np.flatnonzero(mine).tolist(), *values.source.tolist()}}
    for u, v in zip(values.source.tolist(), values.target.tolist(), strict=True):
        if mine[v]:
            readers[u].append(int(v))
    shares: dict[int, int] = {}  # of each node, the first value that it is the last to read
    for u in sorted(readers, reverse=True):
        if readers[u]:
            shares[max(readers[u])] = u
    change = np.zeros(len(values.workspace[mine]) + 1)
    come = np.zeros(len(mine), bool)
    come[[u for u in leaving if not readers[int(u)]]] = True
    for u in sorted(readers, reverse=True):
        first, later = int(place[u]) + 1, sorted(readers[u])
        if not later:
            continue
        end, shared = int(place[later[-1]]), shares[later[-1]] != u and len(later) == 1
        if values.hands_on[later[-1]] and (come[later[-1]] or shared):
            come[u] = len(later) == 1
            end = int(place[later[-2]]) + 1 if len(later) > 1 else first
        if end > first:
            change[first] += values.gradient[u]
            change[end] -= values.gradient[u]
    found = np.cumsum(change)[:-1]
    own = np.flatnonzero(come & mine)
    found[place[own]] -= values.gradient[own]
    return np.asarray(found, np.float64)


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
