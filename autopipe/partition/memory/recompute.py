"""Options of recompute: the classes of nodes that a stage may compute again, the cheapest first.

A class holds all nodes whose forward takes at most so much time for each byte. Consecutive nodes of a class are a
region, run under `torch.utils.checkpoint`. The node after a region joins it where all that it keeps for its backward is
its inputs (a matrix product, a convolution): the repeated run ends when the last kept tensor is there, before that node
computes.

Memory that a node c makes is still held from forward to backward where a node outside of all regions keeps it, or where
a region other than its own reads it: a checkpoint keeps its arguments. All else of a region is dropped, and made again
as a whole just before the region's backward. Long regions are cut where little is alive (Chen et al., Training Deep
Nets with Sublinear Memory Cost, 2016).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import CostGraph, FloatArray, IntArray, RecomputeOption, indivisible, sum_by
from autopipe.partition.memory.storages import Storages
from profiler.records import Profile

SHARES = 8
"""Classes, each with as many more of the saved bytes."""
REGION_SHARES = (1 / 4, 1 / 16, 1 / 64)
"""The most that a region may make again at once, as shares of all saved bytes."""
PARTS, SLICES = tuple(i / 16 for i in range(1, 16)), 64
"""Between two classes: the shares of the graph that take the dearer one, and the slices, of equal bytes, that are dealt
out."""
NEGLIGIBLE = 2e-5
"""The share of the forward below which a node belongs to every class: views, and operators on a few numbers."""
REGION_US = 60.0
"""Time of entering a checkpoint and of starting its second run, measured on a CPU (docs/planner.md)."""


def with_recompute(graph: CostGraph, profile: Profile, recompute: str) -> CostGraph:
    """The graph with the classes that a stage may choose from; `recompute` is `auto` or `full`."""
    memory = _Memory(profile)
    whole = _class(profile, graph, memory, memory.regions(np.inf, np.inf), at_once=True)
    if recompute == "full":
        return dataclasses.replace(graph, classes=(whole,))
    found: dict[bytes, RecomputeOption] = {}
    for region in memory.choices():
        region = memory.numbered(memory.useful(region))
        if region.max() >= 0:
            found.setdefault(region.tobytes(), _class(profile, graph, memory, region, at_once=False))
    return dataclasses.replace(graph, classes=(*graph.classes, *_worth_their_time([*found.values(), whole])))


def _worth_their_time(classes: list[RecomputeOption]) -> list[RecomputeOption]:
    """By time, without those that hold and make no less than a faster one."""
    kept: list[RecomputeOption] = []
    for way in sorted(classes, key=lambda c: (float(c.recompute_us.sum()), c.at_once)):
        size = np.array([way.saved_bytes.sum(), way.workspace_bytes.max()])
        if way.at_once or not any(
            (np.array([c.saved_bytes.sum(), c.workspace_bytes.max()]) <= size).all() for c in kept if not c.at_once
        ):
            kept.append(way)
    return kept


def _lower_hull(points: list[tuple[float, float, IntArray]]) -> list[IntArray]:
    """The regions on the lower convex hull of (time, bytes), by time (Andrew's monotone chain)."""
    hull: list[tuple[float, float, IntArray]] = []
    for point in sorted(points, key=lambda p: p[:2]):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [region for _, _, region in hull]


def _turns_up(
    a: tuple[float, float, IntArray], b: tuple[float, float, IntArray], c: tuple[float, float, IntArray]
) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) <= (b[1] - a[1]) * (c[0] - a[0])


class _Memory(Storages):
    """The storages of a profile, and which nodes may stand in a region together."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        self.forward = np.array([node.forward_us for node in profile.nodes])
        self.repeatable = np.array([node.repeatable for node in profile.nodes], bool)
        size = np.maximum(np.maximum(self.output, self.saved), 1.0)
        self.ratio = np.where(self.forward <= NEGLIGIBLE * self.forward.sum(), 0.0, self.forward / size)
        self.total = np.concatenate([[0.0], np.cumsum(self.saved)])
        self.groups = [np.array(members) for members in indivisible(profile) if len(members) > 1]
        self._find_ends()
        self._find_places()

    def _find_ends(self) -> None:
        """Nodes that keep nothing but inputs, which a region may end with, and the memory that each of them keeps."""
        single = np.ones(len(self.saved), bool)
        for members in self.groups:
            single[members] = False
        own = np.zeros(len(self.saved), bool)
        own[self.kept[self.kept == self.keeper]] = True
        self.ends = self.repeatable & single & ~own & (self.inner == 0)
        self.keeps: list[list[int]] = [[] for _ in self.saved]
        for made, keeper in zip(self.kept.tolist(), self.keeper.tolist(), strict=True):
            self.keeps[keeper].append(made)

    def _find_places(self) -> None:
        """(N + 1) bytes alive between two nodes, and whether a region may be cut there: not within a group."""
        n = len(self.saved)
        last = np.arange(n)
        np.maximum.at(last, self.made, self.reader)
        change, spans = np.zeros(n + 2), np.zeros(n + 2)
        np.add.at(change, np.arange(n) + 1, self.size)
        np.add.at(change, last + 1, -self.size)
        for members in self.groups:
            spans[members.min() + 1] += 1
            spans[members.max() + 1] -= 1
        self.alive = np.where(spans.cumsum() > 0, np.inf, change.cumsum())[: n + 1]

    def choices(self) -> Iterator[IntArray]:
        """Regions of the classes, and mixtures of those that save most for their time: the dearer one in some
        slices."""
        for share in REGION_SHARES:
            most = share * float(self.saved.sum())
            found = [np.full(len(self.saved), -1, np.int64)]
            found += [self.useful(self.regions(ratio, most)) for ratio in self.thresholds()]
            hull = _lower_hull([(self.time_us(r), float(self.held(r).sum()), r) for r in found])
            yield from found
            for one, other in itertools.pairwise(hull):
                for part in PARTS:
                    yield self.mixed(one, other, part)

    def mixed(self, one: IntArray, other: IntArray, part: float) -> IntArray:
        """The regions of `other` in a share of the slices of the graph, those of `one` in the rest; none is cut."""
        n = len(one)
        inside = ((one[1:] == one[:-1]) & (one[1:] >= 0)) | ((other[1:] == other[:-1]) & (other[1:] >= 0))
        places = np.flatnonzero(~inside & np.isfinite(self.alive[1:n])) + 1
        goals = np.arange(1, SLICES) * self.total[-1] / SLICES
        at = np.minimum(np.searchsorted(self.total[places], goals), len(places) - 1) if len(places) else places
        borders = np.unique(places[at])
        number = np.searchsorted(borders, np.arange(n), "right")
        second = np.floor((number + 1) * part) > np.floor(number * part)
        return np.where(second, np.where(other >= 0, other + n, -1), one)

    def time_us(self, region: IntArray) -> float:
        """Time of all second runs."""
        entered = (region >= 0) & (np.diff(region, prepend=-1) != 0)
        return float(self.forward[self.repeated(region)].sum()) + REGION_US * int(entered.sum())

    def thresholds(self) -> list[float]:
        """Time for each byte up to which the classes go, each with a further share of the bytes."""
        order = np.argsort(self.ratio, kind="stable")
        bytes_up_to = np.cumsum(self.saved[order])
        goals = bytes_up_to[-1] * np.arange(1, SHARES) / SHARES
        at = np.minimum(np.searchsorted(bytes_up_to, goals), len(order) - 1)
        return [*sorted({float(r) for r in self.ratio[order[at]]}), np.inf]

    def regions(self, ratio: float, most_bytes: float) -> IntArray:
        """(N) the region of each node, or -1, with the nodes up to this ratio; a region makes at most so many bytes
        again."""
        again = self.repeatable & (self.ratio <= ratio)
        while True:
            region = self._runs(again, most_bytes)
            torn = [members for members in self.groups if len(set(region[members].tolist())) > 1]
            if not torn:
                return region
            again[np.concatenate(torn)] = False

    def _runs(self, again: NDArray[np.bool_], most_bytes: float) -> IntArray:
        n, number, first = len(again), 0, 0
        region = np.full(n, -1, np.int64)
        while first < n:
            if not again[first]:
                first += 1
                continue
            end = first
            while end < n and again[end]:
                end += 1
            for stop in self._cuts(first, end, most_bytes):
                region[first:stop] = number
                first, number = stop, number + 1
            if end < n and self.ends[end] and any(region[made] == number - 1 for made in self.keeps[end]):
                region[end] = number - 1
                first = end + 1
        return region

    def _cuts(self, first: int, end: int, most_bytes: float) -> list[int]:
        """Ends of the regions of a run of nodes: where least is alive, between half and all of the bytes allowed."""
        total, stops = self.total, []
        while total[end] - total[first] > most_bytes:
            low = max(int(np.searchsorted(total, total[first] + most_bytes / 2)), first + 1)
            high = max(int(np.searchsorted(total, total[first] + most_bytes, "right")), low + 1)
            places = np.flatnonzero(np.isfinite(self.alive[low:end])) + low  # a group may be longer than that
            if not len(places):
                break
            near = places[places < high] if places[0] < high else places[:1]
            first = int(near[self.alive[near].argmin()])
            stops.append(first)
        return [*stops, end]

    def held(self, region: IntArray) -> FloatArray:
        """(N) bytes of each node that are held from forward to backward."""
        outside = np.zeros(len(region), bool)
        outside[self.kept[region[self.keeper] < 0]] = True
        argument = np.zeros(len(region), bool)
        reader = region[self.reader]
        argument[self.made[(reader >= 0) & (reader != region[self.made])]] = True
        inner = np.where(region < 0, self.inner, 0.0)
        return np.asarray(
            inner + np.where(argument, self.size, np.where(outside, self.saved - self.inner, 0.0)), np.float64
        )

    def useful(self, region: IntArray) -> IntArray:
        """The regions that drop anything."""
        inside = region >= 0
        if not inside.any():
            return region
        dropped = sum_by(region[inside], (self.saved - self.held(region))[inside], int(region.max()) + 1)
        return np.where(inside & (dropped[region] > 0), region, -1)

    def numbered(self, region: IntArray) -> IntArray:
        """The same regions with numbers from 0 on; what was a region is cut in two where others lie between."""
        entered = (region >= 0) & (np.diff(region, prepend=-1) != 0)
        return np.where(region >= 0, np.cumsum(entered) - 1, -1)

    def repeated(self, region: IntArray) -> NDArray[np.bool_]:
        """(N) nodes that run twice: all of a region but the node that it ends with, where that keeps only inputs."""
        final = np.append(region[1:] != region[:-1], True)
        keeps = np.array([bool(made) for made in self.keeps])
        return np.asarray((region >= 0) & ~(final & self.ends & keeps), np.bool_)


def _class(profile: Profile, graph: CostGraph, memory: _Memory, region: IntArray, *, at_once: bool) -> RecomputeOption:
    node_of, inside = graph.node_of(), region >= 0
    again = memory.repeated(region)
    count = int(region.max(initial=-1)) + 1
    made = sum_by(region[inside], np.where(again, memory.saved, 0.0)[inside], count)
    workspace = np.array([node.workspace_bytes for node in profile.nodes], float)
    entered = inside & (np.diff(region, prepend=-1) != 0)
    if not at_once:
        workspace[inside] += made[region[inside]]
    largest = np.zeros(graph.num_nodes)
    np.maximum.at(largest, node_of, workspace)
    time_us = np.where(again, memory.forward, 0.0) * profile.residual + np.where(entered, REGION_US, 0.0)
    return RecomputeOption(
        region=region,
        at_once=at_once,
        saved_bytes=sum_by(node_of, memory.held(region), graph.num_nodes),
        workspace_bytes=largest,
        recompute_us=sum_by(node_of, time_us, graph.num_nodes),
    )
