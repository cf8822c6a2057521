"""The planner against every monotone assignment of small random graphs, one by one, with a simulator of the test's
own."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autopipe.partition import partition
from profiler.records import LinkProfile, Profile
from scenarios.random_profiles import random_profile
from tests.pure.partition_reference import loads_us, monotone_assignments, peaks_bytes, step_us

NUM_GRAPHS = 500
MOST_ASSIGNMENTS = 1500


def case(seed: int) -> tuple[Profile, int, int, LinkProfile]:
    """A random graph of up to 14 nodes with few enough assignments to try them all."""
    size = 6 + seed % 9
    link = LinkProfile(latency_us=seed % 2 * 0.7, bytes_per_us=400.0, overlap=0.5 * (seed % 3))
    profile = random_profile(seed, size, groups=seed % 4 == 0, chain=size > 11)
    return profile, 2 + seed % 3, 1 + seed % 8, link


def every_assignment(profile: Profile, num_stages: int) -> list[dict[str, int]]:
    found = []
    for stage in monotone_assignments(profile, num_stages):
        found.append(stage)
        if len(found) > MOST_ASSIGNMENTS:
            return []
    return found


@pytest.mark.parametrize("capped", [False, True], ids=["free", "capped"])
def test_the_bottleneck_is_the_least_of_all_assignments(capped: bool) -> None:
    tried = 0
    for seed in range(NUM_GRAPHS // 2):
        profile, K, M, link = case(seed + 1000 * capped)
        every = every_assignment(profile, K)
        if not every:
            continue
        peaks = [max(peaks_bytes(profile, stage, K, M)) for stage in every]
        limit = float(np.quantile(peaks, 0.15)) if capped else math.inf
        best = min(
            max(loads_us(profile, stage, K, link)) for stage, peak in zip(every, peaks, strict=True) if peak <= limit
        )
        plan = partition(
            profile,
            num_stages=K,
            num_microbatches=M,
            link=link,
            objective="bottleneck",
            memory_limit=limit if capped else None,
            recompute="none",
        )
        tried += 1
        assert plan.bottleneck_us == pytest.approx(best, rel=1e-9), seed
        assert plan.bottleneck_bound_us <= best * (1 + 1e-9), seed
        assert max(s.peak_bytes for s in plan.stages) <= limit + 1
    assert tried > NUM_GRAPHS // 4


def test_the_step_is_the_shortest_of_all_assignments() -> None:
    tried = 0
    for seed in range(5000, 5000 + NUM_GRAPHS // 5):
        profile, K, M, link = case(seed)
        every = every_assignment(profile, K)
        if not every or len(every) > 600:
            continue
        best = min(step_us(profile, stage, K, M, link) for stage in every)
        plan = partition(profile, num_stages=K, num_microbatches=M, link=link)
        assert plan.lower_bound_us <= best * (1 + 1e-9), seed
        assert plan.step_us == pytest.approx(best, rel=1e-9), seed
        assert plan.proved, seed
        tried += 1
    assert tried > NUM_GRAPHS // 10
