"""The planner against all monotone assignments of small random graphs: `python benchmarks/planner.py --brute-force
500`.

Nothing of the planner's cost model is used: loads, peaks and steps of all assignments come from
`scenarios/assignments.py` (`tests/pure/test_partition_brute_force.py` holds them against loops over one assignment).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from autopipe.errors import PartitionError
from autopipe.partition import partition
from profiler.records import LinkProfile, Profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scenarios.assignments import Stages, assignments, costs, steps_us
from scenarios.random_profiles import random_profile

CAP_QUANTILE = 0.15
"""The cap lets this share of all assignments through."""


def cases(count: int) -> Iterator[tuple[int, Profile, int, int, LinkProfile, Stages]]:
    """Random graphs of 4 to 14 nodes with K, M, a link, and all their assignments."""
    seed = found = 0
    while found < count:
        num_nodes, K, M = 4 + seed % 11, 2 + seed % 3, 1 + seed % 8
        link = LinkProfile(latency_us=seed % 2 * 0.7, bytes_per_us=400.0, overlap=0.5 * (seed % 3))
        profile = random_profile(seed, num_nodes, chain=seed % 5 == 0)
        every = assignments(profile, K)
        seed += 1
        if every is not None and len(every):
            found += 1
            yield seed - 1, profile, K, M, link, every


def brute_force(count: int) -> Iterator[dict[str, Any]]:
    """A row for each graph, with and without a cap: what the planner reaches over the best of all assignments."""
    for seed, profile, K, M, link, every in cases(count):
        load, peak = costs(profile, every, K, M, link)
        step = steps_us(profile, every, K, M, link)
        for cap in (np.inf, float(np.quantile(peak, CAP_QUANTILE))):
            fits = peak <= cap
            best_load, best_step = float(load[fits].min()), float(step[fits].min())
            common = {
                "num_stages": K,
                "num_microbatches": M,
                "link": link,
                "memory_limit": None if np.isinf(cap) else cap,
                "recompute": "none",
            }
            try:
                least = partition(profile, objective="bottleneck", **common)
                plan = partition(profile, objective="step", **common)
            except PartitionError as error:
                raise AssertionError(f"graph {seed}: {best_load} us fits into {cap} bytes, but {error}") from None
            yield {
                "graph": seed,
                "nodes": len(profile.nodes),
                "stages": K,
                "micro-batches": M,
                "assignments": int(fits.sum()),
                "capped": bool(np.isfinite(cap)),
                "load over best": least.bottleneck_us / best_load,
                "step over best": plan.step_us / best_step if best_step else 1.0,
                "step proved": plan.proved,
                "bounds hold": bool(
                    least.bottleneck_bound_us <= best_load * (1 + 1e-9)
                    and plan.lower_bound_us <= best_step * (1 + 1e-9)
                ),
            }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With and without a cap: how many loads are equal to the best, and how far steps are from it."""
    found = []
    for capped in (False, True):
        part = [row for row in rows if row["capped"] == capped]
        steps = np.array([row["step over best"] for row in part])
        found.append(
            {
                "cap": "15 % of assignments fit" if capped else "none",
                "graphs": len(part),
                "assignments": sum(row["assignments"] for row in part),
                "load equal": sum(abs(row["load over best"] - 1) <= 1e-9 for row in part),
                "step: mean over best": float(steps.mean()),
                "step: worst": float(steps.max()),
                "step equal": int((abs(steps - 1) <= 1e-9).sum()),
                "step proved": sum(row["step proved"] for row in part),
                "bounds hold": all(row["bounds hold"] for row in part),
            }
        )
    return found
