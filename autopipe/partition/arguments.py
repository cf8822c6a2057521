"""Checks of the caller's arguments: every wrong value is a `PartitionError` that says what would be right."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence

import numpy as np

from autopipe.cost import DEFAULT_LINK, CostGraph, IntArray
from autopipe.errors import PartitionError
from autopipe.partition.constraints import nodes_of
from autopipe.partition.memory.model import OPTIMIZER_STATES, MemoryModel
from autopipe.schedule.kinds import PLANNED
from profiler.records import LinkProfile, Profile

OBJECTIVES = ("step", "bottleneck")
MICROBATCHES_PER_STAGE = 4
"""Micro-batches of a step for each stage where the caller names no number: even stages then wait less than a fifth."""


def checked_link(profile: Profile, link: LinkProfile | None, overlap: float | None) -> LinkProfile:
    """The link of the call, of the profile, or the default, with the overlap of the call."""
    link = link or profile.link or DEFAULT_LINK
    link = link if overlap is None else dataclasses.replace(link, overlap=overlap)
    if not (link.bytes_per_us > 0 and link.latency_us >= 0):
        raise PartitionError(
            f"a link of {link.latency_us} us and {link.bytes_per_us} bytes/us",
            expected="latency_us >= 0 and bytes_per_us > 0",
            where="link",
            remedy="measure it with `autopipe profile` under torchrun, or correct --link-latency-us and --link-gbps",
        )
    if not 0 <= link.overlap <= 1:
        raise PartitionError(
            f"overlap {link.overlap}",
            expected="a share from 0 (nothing hidden) to 1 (all hidden)",
            where="overlap",
            remedy="give a number from 0 to 1",
        )
    return link


def checked_count(value: object, name: str) -> int:
    """A number of stages, micro-batches or replicas."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PartitionError(
            f"{name}={value!r}", expected="an integer, at least 1", where=name, remedy=f"give {name} >= 1"
        )
    return value


def checked_choice(value: str, choices: Iterable[str], name: str) -> str:
    """One of several words."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), list(choices), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(choices)}"
        raise PartitionError(f"{name}={value!r}", expected=f"one of {', '.join(choices)}", where=name, remedy=hint)
    return value


def checked_limit(memory_limit: float | None) -> float | None:
    """Bytes of each device, or None."""
    if memory_limit is not None and not memory_limit > 0:
        raise PartitionError(
            f"memory_limit={memory_limit!r}",
            expected="a positive number of bytes, or None",
            where="memory_limit",
            remedy="leave it out to plan without a limit",
        )
    return memory_limit


def checked_memory(
    *,
    num_microbatches: int,
    schedule: str,
    optimizer: str | float,
    zero_stage: int,
    data_parallel: int,
    memory_limit: float | None,
) -> MemoryModel:
    """The rules of memory; an optimizer is a name, or bytes of state for each byte of trained parameter."""
    if isinstance(optimizer, str):
        states = OPTIMIZER_STATES[checked_choice(optimizer.lower(), OPTIMIZER_STATES, "optimizer")]
    else:
        states = float(optimizer)
    if not (states >= 0 and math.isfinite(states)):
        raise PartitionError(
            f"optimizer={optimizer!r}",
            expected="a name, or bytes of state for each parameter byte that are not negative",
            where="optimizer",
            remedy="2.0 stands for Adam, 1.0 for momentum, 0.0 for plain SGD",
        )
    if zero_stage not in (0, 1):
        raise PartitionError(
            f"zero_stage={zero_stage!r}",
            expected="0 or 1",
            where="zero_stage",
            remedy="use 1: the communication of ZeRO-2 and 3 would recur for every micro-batch of the pipeline",
        )
    checked_limit(memory_limit)
    return MemoryModel(
        num_microbatches=num_microbatches,
        schedule=checked_choice(schedule, PLANNED, "schedule"),
        states=states,
        shards=data_parallel if zero_stage else 1,
        limit_bytes=math.inf if memory_limit is None else float(memory_limit),
    )


def check_stages_fit_nodes(graph: CostGraph, num_stages: int) -> None:
    """Every stage needs a node of its own."""
    if num_stages > graph.num_nodes:
        merged = (
            "" if graph.num_nodes == len(graph.profile_names) else ", counting those that may not be cut apart as one"
        )
        raise PartitionError(
            f"num_stages={num_stages} for a graph of {graph.num_nodes} nodes{merged}",
            expected="at least one node for each stage",
            where="num_stages",
            remedy=f"use at most {graph.num_nodes} stages, or profile a finer graph",
        )


def stages_from_split_points(profile: Profile, graph: CostGraph, points: Sequence[str]) -> IntArray:
    """(n) stages that begin at the first node of each named module, in program order."""
    node_of = graph.node_of()
    starts: dict[int, str] = {}
    for point in points:
        inside = nodes_of(profile, point, "split_points")
        first = int(min(node_of[inside]))
        if first == 0 or first in starts:
            other = "the whole model does" if first == 0 else f"{starts[first]!r} does"
            raise PartitionError(
                f"split point {point!r} begins where {other}",
                expected="a stage that is not empty before each split point",
                where="split_points",
                remedy=f"leave {point!r} out, or name a later module",
            )
        starts[first] = point
    border = np.zeros(graph.num_nodes, np.int64)
    border[sorted(starts)] = 1
    return np.cumsum(border)
