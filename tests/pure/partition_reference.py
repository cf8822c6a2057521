"""The cost model once more, in loops over a profile and nothing else: what the planner's arrays are checked against."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from profiler.records import LinkProfile, Profile

POSTED = 2
"""Receives that a stage has open from each other stage, forward and back."""


def crossings(profile: Profile, stage: Mapping[str, int]) -> set[tuple[str, int, int]]:
    """(tensor, source stage, target stage), each once."""
    return {
        (name, stage[name], stage[node.name])
        for node in profile.nodes
        for name in node.inputs
        if stage[name] != stage[node.name]
    }


def loads_us(profile: Profile, stage: Mapping[str, int], num_stages: int, link: LinkProfile) -> list[float]:
    """The load of each stage: compute, and the exposed share of what crosses its borders."""
    node = {n.name: n for n in profile.nodes}
    loads = [0.0] * num_stages
    for n in profile.nodes:
        loads[stage[n.name]] += n.forward_us + n.backward_us
    crossed = crossings(profile, stage)
    share = 1 - link.overlap
    sides: set[tuple[int, str, str]] = set()
    sent: set[tuple[str, int, str]] = set()
    for name, source, target in crossed:
        for way in ("there", "back") if node[name].differentiable and node[name].output_bytes else ("there",):
            sides |= {(source, "out", way), (target, "in", way)}
            sent |= {(name, source, f"out {way}"), (name, target, f"in {way}")}
    for name, at, _ in sent:
        loads[at] += share * node[name].output_bytes / link.bytes_per_us
    for at, _, _ in sides:
        loads[at] += share * link.latency_us
    return loads


def peaks_bytes(
    profile: Profile,
    stage: Mapping[str, int],
    num_stages: int,
    num_microbatches: int,
    states: float = 2.0,
    shards: int = 1,
) -> list[float]:
    """Peak memory of each stage under 1F1B."""
    node = {n.name: n for n in profile.nodes}
    crossed = crossings(profile, stage)
    peaks = []
    for k in range(num_stages):
        mine = [n for n in profile.nodes if stage[n.name] == k]
        static = 0.0
        for name in {p for n in mine for p in n.params}:
            parameter = profile.parameters[name]
            static += parameter.bytes * (1 + (1 + states / shards if parameter.trainable else 0))
        received = sum(node[t].output_bytes for t, _, target in crossed if target == k)
        sent = sum(node[t].output_bytes for t in {t for t, source, _ in crossed if source == k})
        held = sum(n.saved_bytes for n in mine) + received
        buffers = min(2, num_microbatches - 1) * (2 * received + sent)
        workspace = max((n.workspace_bytes for n in mine), default=0)
        peaks.append(static + min(num_stages - k, num_microbatches) * held + buffers + workspace)
    return peaks


def interval_assignments(order: Sequence[Sequence[str]], num_stages: int) -> Iterator[dict[str, int]]:
    """Every split of an order of groups of nodes into stages that are intervals, none empty."""
    for cuts in itertools.combinations(range(1, len(order)), num_stages - 1):
        bounds = [0, *cuts, len(order)]
        yield {name: k for k in range(num_stages) for group in order[bounds[k] : bounds[k + 1]] for name in group}


def monotone_assignments(profile: Profile, num_stages: int) -> Iterator[dict[str, int]]:
    """Every assignment in which no node is on an earlier stage than what it reads; groups together, no stage empty."""
    nodes = profile.nodes

    def extend(i: int, stage: dict[str, int], at: dict[str, int]) -> Iterator[dict[str, int]]:
        if i == len(nodes):
            if len(set(stage.values())) == num_stages:
                yield dict(stage)
            return
        node = nodes[i]
        low = max((stage[name] for name in node.inputs), default=0)
        known = at.get(node.group) if node.group is not None else None
        for k in range(low, num_stages) if known is None else [known] if known >= low else []:
            stage[node.name] = k
            yield from extend(i + 1, stage, at if node.group is None else {**at, node.group: k})
        stage.pop(node.name, None)

    yield from extend(0, {}, {})


def step_us(
    profile: Profile, stage: Mapping[str, int], num_stages: int, num_microbatches: int, link: LinkProfile
) -> float:
    """The makespan of 1F1B, by following the stages' own orders until nothing is left to run.

    A message leaves when it is made, the one before it on its way is there, and its receiver has read the second before
    it.
    """
    node = {n.name: n for n in profile.nodes}
    K, M = num_stages, num_microbatches
    there: dict[tuple[int, int], float] = {}
    back: dict[tuple[int, int], float] = {}
    for name, source, target in crossings(profile, stage):
        there[source, target] = (
            there.get((source, target), link.latency_us) + node[name].output_bytes / link.bytes_per_us
        )
        if node[name].differentiable and node[name].output_bytes:
            way = (source, target)
            back[way] = back.get(way, link.latency_us) + node[name].output_bytes / link.bytes_per_us
    time = {("F", k): sum(n.forward_us for n in profile.nodes if stage[n.name] == k) for k in range(K)}
    time |= {("B", k): sum(n.backward_us for n in profile.nodes if stage[n.name] == k) for k in range(K)}
    for kind, messages in (("F", there), ("B", back)):
        for ends, cost in messages.items():
            for k in ends:
                time[kind, k] += (1 - link.overlap) * cost
    queues = []
    for k in range(K):
        warm = min(K - k, M)
        queue = [("F", m) for m in range(warm)]
        for m in range(M):
            queue.append(("B", m))
            if warm + m < M:
                queue.append(("F", warm + m))
        queues.append(queue)
    ended: dict[tuple[str, int, int], float] = {}
    link_free: dict[tuple[str, int, int], float] = {}
    clock = [0.0] * K
    while any(queues):
        for k in range(K):
            while queues[k]:
                kind, m = queues[k][0]
                waits = {s: c for (s, t), c in there.items() if t == k} if kind == "F" else {}
                waits |= {t: c for (s, t), c in back.items() if s == k} if kind == "B" else {}
                if any((kind, other, m) not in ended for other in waits):
                    break
                for other, cost in waits.items():
                    line = (kind, other, k)
                    posted = ended[kind, k, m - POSTED] if m >= POSTED else 0.0
                    link_free[line] = max(ended[kind, other, m], link_free.get(line, 0.0), posted) + link.overlap * cost
                    clock[k] = max(clock[k], link_free[line])
                ended[kind, k, m] = clock[k] = clock[k] + time[kind, k]
                queues[k].pop(0)
    return max(clock)
