"""All assignments of a small graph at once: loads, peaks and steps, in arrays that use nothing of the planner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profiler.records import LinkProfile, Profile

Stages = NDArray[np.int8]
"""(assignments, nodes) stages."""
MOST_ASSIGNMENTS = 300_000
POSTED = 2
"""Receives that a stage has open from each other stage, forward and back."""


def assignments(profile: Profile, num_stages: int) -> Stages | None:
    """Every assignment in which no node is before what it reads and no stage is empty; None where they are too many."""
    index = {node.name: i for i, node in enumerate(profile.nodes)}
    found = np.zeros((1, 0), np.int8)
    for node in profile.nodes:
        inputs = [index[name] for name in node.inputs]
        low = found[:, inputs].max(axis=1) if inputs else np.zeros(len(found), np.int8)
        parts = [np.column_stack([found[low <= k], np.full((low <= k).sum(), k, np.int8)]) for k in range(num_stages)]
        found = np.concatenate(parts)
        if len(found) > MOST_ASSIGNMENTS:
            return None
    return found[np.all([(found == k).any(axis=1) for k in range(num_stages)], axis=0)]


def costs(
    profile: Profile, stages: Stages, num_stages: int, num_microbatches: int, link: LinkProfile
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The largest load in microseconds and the largest peak in bytes of each assignment, under 1F1B with Adam."""
    nodes, K = profile.nodes, num_stages
    index = {node.name: i for i, node in enumerate(nodes)}
    readers: dict[int, list[int]] = {}
    for i, node in enumerate(nodes):
        for name in node.inputs:
            readers.setdefault(index[name], []).append(i)
    on = [stages == k for k in range(K)]
    load = np.stack([o @ np.array([n.forward_us + n.backward_us for n in nodes]) for o in on])
    received, sent = np.zeros_like(load), np.zeros_like(load)
    messages = np.zeros((4, *load.shape), bool)
    for u, by in readers.items():
        size, back = nodes[u].output_bytes, nodes[u].differentiable and nodes[u].output_bytes > 0
        for k in range(K):
            enters = on[k][:, by].any(axis=1) & ~on[k][:, u]
            leaves = on[k][:, u] & (~on[k][:, by]).any(axis=1)
            received[k] += size * enters
            sent[k] += size * leaves
            load[k] += (1 - link.overlap) * (1 + back) * size / link.bytes_per_us * (enters.astype(float) + leaves)
            for way, there in enumerate((enters, leaves)):
                messages[way, k] |= there
                messages[2 + way, k] |= there & back
    load += (1 - link.overlap) * link.latency_us * messages.sum(axis=0)
    peak = np.zeros_like(load)
    for k in range(K):
        for name, parameter in profile.parameters.items():
            holders = [i for i, node in enumerate(nodes) if name in node.params]
            peak[k] += parameter.bytes * (4 if parameter.trainable else 1) * on[k][:, holders].any(axis=1)
        saved = on[k] @ np.array([node.saved_bytes for node in nodes], float)
        peak[k] += min(K - k, num_microbatches) * (saved + received[k])
        peak[k] += min(2, num_microbatches - 1) * (2 * received[k] + sent[k])
        peak[k] += (on[k] * np.array([node.workspace_bytes for node in nodes], float)).max(axis=1)
    return load.max(axis=0), peak.max(axis=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """Time of the messages of A assignments between each two stages (s < t), forward and back, and whether there are
    any."""

    there: dict[tuple[int, int], NDArray[np.float64]]
    back: dict[tuple[int, int], NDArray[np.float64]]
    sent: dict[tuple[int, int], NDArray[np.bool_]]
    returned: dict[tuple[int, int], NDArray[np.bool_]]


def messages(profile: Profile, stages: Stages, num_stages: int, link: LinkProfile) -> Messages:
    """A message for each pair of stages of which one reads what the other makes; each tensor is in it once."""
    pairs = [(s, t) for t in range(num_stages) for s in range(t)]
    zeros = {pair: np.zeros(len(stages)) for pair in pairs}
    size, back_size = zeros, {pair: none.copy() for pair, none in zeros.items()}
    sent = {pair: np.zeros(len(stages), bool) for pair in pairs}
    returned = {pair: np.zeros(len(stages), bool) for pair in pairs}
    for u, node in enumerate(profile.nodes):
        by = [i for i, reader in enumerate(profile.nodes) if node.name in reader.inputs]
        back = node.differentiable and node.output_bytes > 0
        for s, t in pairs:
            crosses = (stages[:, u] == s) & (stages[:, by] == t).any(axis=1)
            size[s, t] += node.output_bytes * crosses
            back_size[s, t] += back * node.output_bytes * crosses
            sent[s, t] |= crosses
            returned[s, t] |= crosses & back

    def time(num_bytes: NDArray[np.float64], there: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.where(there, link.latency_us + num_bytes / link.bytes_per_us, 0.0)

    return Messages(
        there={pair: time(size[pair], sent[pair]) for pair in pairs},
        back={pair: time(back_size[pair], returned[pair]) for pair in pairs},
        sent=sent,
        returned=returned,
    )


def steps_us(profile: Profile, stages: Stages, K: int, M: int, link: LinkProfile) -> NDArray[np.float64]:
    """(A) the makespan of 1F1B under each assignment: the actions of all stages, each played for all assignments at
    once.

    A compute waits for its stage and for what it reads. A message waits for the one before it between the same stages,
    and for the compute that has read the one before that: a stage has two receives of a kind open.
    """
    going = messages(profile, stages, K, link)
    time = {}
    for kind, way in (("F", going.there), ("B", going.back)):
        cost = np.array([n.forward_us if kind == "F" else n.backward_us for n in profile.nodes])
        for k in range(K):
            exposed = sum((us for pair, us in way.items() if k in pair), np.zeros(len(stages)))
            time[kind, k] = (stages == k) @ cost + (1 - link.overlap) * exposed
    ended: dict[tuple[str, int, int], NDArray[np.float64]] = {}
    free: dict[tuple[str, int, int], NDArray[np.float64]] = {}
    clock = [np.zeros(len(stages)) for _ in range(K)]
    for kind, k, m in played(K, M):
        ways = [((s, k), s) for s in range(k)] if kind == "F" else [((k, t), t) for t in range(k + 1, K)]
        for pair, other in ways:
            there, taken = (going.sent, going.there) if kind == "F" else (going.returned, going.back)
            start = np.maximum(ended[kind, other, m], free.get((kind, other, k), 0.0))
            if m >= POSTED:
                start = np.maximum(start, ended[kind, k, m - POSTED])
            free[kind, other, k] = start + link.overlap * taken[pair]
            clock[k] = np.maximum(clock[k], np.where(there[pair], free[kind, other, k], 0.0))
        ended[kind, k, m] = clock[k] = clock[k] + time[kind, k]
    return np.max(clock, axis=0)


def played(K: int, M: int) -> Iterator[tuple[str, int, int]]:
    """(kind, stage, micro-batch) of 1F1B in an order in which whatever an action reads was made before it."""
    queues: list[list[tuple[str, int]]] = []
    for k in range(K):
        warm = min(K - k, M)
        steady = [pair for m in range(M) for pair in ((("B", m), ("F", warm + m)) if warm + m < M else (("B", m),))]
        queues.append([*(("F", m) for m in range(warm)), *steady])
    done = set()
    while any(queues):
        for k, queue in enumerate(queues):
            while queue:
                kind, m = queue[0]
                if any((kind, other, m) not in done for other in (range(k) if kind == "F" else range(k + 1, K))):
                    break
                done.add((kind, k, m))
                queue.pop(0)
                yield kind, k, m
