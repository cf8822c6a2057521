"""Profiles of one graph at one or more micro-batch sizes become its profile at another size."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from profiler.errors import ProfileError
from profiler.records import NodeProfile, Profile

AFFINE, PROPORTIONAL = "affine", "proportional"
TIMES = ("forward_us", "backward_us")
SIZES = ("output_bytes", "saved_bytes", "workspace_bytes", "inner_bytes")


def check_sizes(profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """The profiles by micro-batch size, each of another size and all of the same nodes.

    Raises:
        ProfileError: none, two of one size, or nodes that differ.
    """
    if not profiles:
        raise ProfileError("no profile", expected="at least one", where="profile", remedy="give the profile to plan")
    ordered = tuple(sorted(profiles, key=lambda p: p.microbatch_size))
    first = ordered[0]
    for earlier, later in itertools.pairwise(ordered):
        if earlier.microbatch_size == later.microbatch_size:
            raise ProfileError(
                f"two profiles of micro-batch size {later.microbatch_size}",
                expected="profiles of different sizes",
                where="profile",
                remedy="leave one out, or measure one at another size",
            )
        if [(n.name, n.inputs) for n in later.nodes] != [(n.name, n.inputs) for n in first.nodes]:
            raise ProfileError(
                f"other nodes at micro-batch size {later.microbatch_size} than at {first.microbatch_size}",
                expected="the same graph at every size",
                where="profile",
                remedy="profile the same model, at two sizes above 1: some models compute differently for one sample",
            )
    return ordered


def sizes_to_profile(batch: int, num_devices: int) -> list[int]:
    """Two micro-batch sizes about those that a search over the uses of devices will weigh, so that what a micro-batch
    costs by itself is known.

    From two samples on: with one, some models compute differently.
    """
    small = min(max(2, batch // (4 * num_devices)), batch)
    return [small] if 2 * small > batch else [small, 2 * small]


def scaling_rule(profiles: Sequence[Profile], microbatch_size: int) -> str:
    """Rule by which `at_size` scales; empty if this size was profiled."""
    if any(p.microbatch_size == microbatch_size for p in profiles):
        return ""
    return AFFINE if len(profiles) > 1 else PROPORTIONAL


def at_size(profiles: Sequence[Profile], microbatch_size: int) -> Profile:
    """The profile at a micro-batch size: a line through the two nearest sizes, or in proportion where there is one
    profile.

    Figures of a size that was not profiled are marked as not measured. Lines never go below zero.

    Args:
        profiles: as from `check_sizes`.
    """
    for profile in profiles:
        if profile.microbatch_size == microbatch_size:
            return profile
    nearest = sorted(profiles, key=lambda p: abs(p.microbatch_size - microbatch_size))[:2]
    one = nearest[0]
    if len(nearest) == 1:
        ratio = microbatch_size / one.microbatch_size
        nodes = [_node(n, {k: ratio * float(getattr(n, k)) for k in (*TIMES, *SIZES)}) for n in one.nodes]
        return dataclasses.replace(one, nodes=tuple(nodes), microbatch_size=microbatch_size)
    other = nearest[1]
    share = (microbatch_size - one.microbatch_size) / (other.microbatch_size - one.microbatch_size)
    residuals = {True: 1.0, False: other.residual / one.residual}  # one residual scales them all afterwards
    nodes = []
    for a, b in zip(one.nodes, other.nodes, strict=True):
        values = {}
        for name in (*TIMES, *SIZES):
            here, there = float(getattr(a, name)), float(getattr(b, name)) * residuals[name in SIZES]
            values[name] = max(here + share * (there - here), 0.0)
        nodes.append(_node(a, values))
    return dataclasses.replace(one, nodes=tuple(nodes), microbatch_size=microbatch_size)


def _node(node: NodeProfile, values: dict[str, float]) -> NodeProfile:
    changes: dict[str, Any] = {name: round(value) if name in SIZES else value for name, value in values.items()}
    return dataclasses.replace(node, measured=False, **changes)
