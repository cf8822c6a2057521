"""The arrays of `scenarios/assignments.py` against loops over one assignment after another."""

from __future__ import annotations

import numpy as np
import pytest

from profiler.records import LinkProfile
from scenarios.assignments import assignments, costs, steps_us
from scenarios.random_profiles import random_profile
from tests.pure.partition_reference import loads_us, monotone_assignments, peaks_bytes, step_us


@pytest.mark.parametrize("seed", range(24))
def test_all_assignments_at_once_cost_what_each_costs_by_itself(seed: int) -> None:
    K, M = 2 + seed % 3, 1 + seed % 8
    profile = random_profile(seed, 4 + seed % 5)
    link = LinkProfile(latency_us=seed % 2 * 0.7, bytes_per_us=400.0, overlap=0.5 * (seed % 3))
    every = assignments(profile, K)
    names = [node.name for node in profile.nodes]
    one_by_one = list(monotone_assignments(profile, K))
    assert every is not None
    assert sorted(map(tuple, every.tolist())) == sorted(tuple(stage[name] for name in names) for stage in one_by_one)
    load, peak = costs(profile, every, K, M, link)
    step = steps_us(profile, every, K, M, link)
    for i in range(0, len(every), max(len(every) // 40, 1)):
        stage = dict(zip(names, every[i].tolist(), strict=True))
        assert load[i] == pytest.approx(max(loads_us(profile, stage, K, link)), rel=1e-12)
        assert peak[i] == pytest.approx(max(peaks_bytes(profile, stage, K, M)), rel=1e-12)
        assert step[i] == pytest.approx(step_us(profile, stage, K, M, link), rel=1e-12)
    assert np.isfinite(step).all()
