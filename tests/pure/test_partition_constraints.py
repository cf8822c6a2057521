"""Modules together, alone, first and last: against every assignment that obeys, with their price, and contradictions by
name."""

from __future__ import annotations

import math
import random

import pytest

from autopipe.errors import PartitionError
from autopipe.partition import Constraints, partition
from profiler.records import LinkProfile, NodeProfile, Profile
from scenarios.random_profiles import random_profile
from tests.pure.partition_reference import loads_us, monotone_assignments, peaks_bytes

LINK = LinkProfile(latency_us=0.3, bytes_per_us=400.0, overlap=0.5)


def random_constraints(seed: int, num_nodes: int) -> Constraints:
    rng = random.Random(seed)
    name = [f"n{i}" for i in range(num_nodes)]
    kind = seed % 5
    return Constraints(
        together=[rng.sample(name, 2)] if kind in (0, 4) else [],
        alone=[rng.choice(name)] if kind in (1, 4) else [],
        first=[rng.choice(name)] if kind in (2, 4) else [],
        last=[rng.choice(name)] if kind in (3, 4) else [],
    )


def obeys(stage: dict[str, int], constraints: Constraints, num_stages: int) -> bool:
    alone = all(sum(s == stage[name] for s in stage.values()) == 1 for name in constraints.alone)
    together = all(len({stage[name] for name in names}) == 1 for names in constraints.together)
    first = all(stage[name] == 0 for name in constraints.first)
    last = all(stage[name] == num_stages - 1 for name in constraints.last)
    return alone and together and first and last


@pytest.mark.parametrize("capped", [False, True])
def test_the_best_of_all_assignments_that_obey(capped: bool) -> None:
    solved = refused = 0
    for seed in range(25):
        profile, K, M = random_profile(seed, 8), 2 + seed % 3, 1 + seed % 4
        constraints = random_constraints(seed, 8)
        every = [s for s in monotone_assignments(profile, K) if obeys(s, constraints, K)]
        peaks = sorted(max(peaks_bytes(profile, s, K, M)) for s in every)
        limit = peaks[len(peaks) // 4] if capped and peaks else math.inf
        allowed = [s for s in every if max(peaks_bytes(profile, s, K, M)) <= limit]
        arguments = {
            "num_stages": K,
            "num_microbatches": M,
            "link": LINK,
            "constraints": constraints,
            "recompute": "none",
        }
        if not allowed:
            with pytest.raises(PartitionError, match=r"constraints|cut apart"):
                partition(profile, **arguments)
            refused += 1
            continue
        for objective in ("bottleneck", "step"):
            plan = partition(
                profile,
                objective=objective,
                memory_limit=limit if capped else None,
                time_budget_s=0.2,
                **arguments,
            )
            assert obeys(plan.stage_of, constraints, K)
            if objective == "bottleneck":
                best = min(max(loads_us(profile, s, K, LINK)) for s in allowed)
                assert plan.bottleneck_us == pytest.approx(best, rel=1e-9), seed
                assert plan.bottleneck_bound_us <= best * (1 + 1e-9)
            prices = [b for b in plan.baselines if b.name.startswith("without")]
            assert prices
            if objective == "step":
                assert all(b.step_us <= plan.step_us * (1 + 1e-9) for b in prices)
        solved += 1
    assert solved > 12
    assert refused > 1


def chain(num_nodes: int = 8) -> Profile:
    return Profile(
        nodes=tuple(
            NodeProfile(
                name=f"n{i}",
                inputs=(f"n{i - 1}",) if i else (),
                forward_us=1.0,
                backward_us=2.0,
                output_bytes=10,
                module=f"blocks.{i}",
            )
            for i in range(num_nodes)
        )
    )


def test_each_constraint_has_its_price() -> None:
    constraints = Constraints(together=[["blocks.0", "blocks.2"]], alone=["blocks.5"], last=["blocks.7"])
    plan = partition(chain(), num_stages=4, link=LINK, constraints=constraints)
    assert [s.nodes for s in plan.stages if "n5" in s.nodes] == [("n5",)]
    names = [b.name for b in plan.baselines if b.name.startswith("without")]
    assert names == [
        "without together blocks.0, blocks.2",
        "without alone blocks.5",
        "without last blocks.7",
        "without the constraints",
    ]


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (Constraints(alone=["block.3"]), "constraint 'block.3' names no module"),
        (Constraints(first=["blocks.5"], last=["blocks.3"]), "blocks.5 first and blocks.3 last: 'n3' would be on both"),
        (Constraints(first=["blocks.2"], last=["blocks.2"]), "blocks.2 first and blocks.2 last"),
        (Constraints(alone=["blocks.3"], together=[["blocks.2", "blocks.4"]]), "'blocks.3' alone, but 'n2' cannot"),
        (Constraints(alone=["blocks.1"], first=["blocks.3"]), "'blocks.1' alone: the first or the last stage"),
        (Constraints(alone=["blocks.1", "blocks.3", "blocks.5"]), "no split into 4 stages meets the constraints"),
        (Constraints(together=[["blocks.0", "blocks.6"]]), "num_stages=4 for a graph of 2 nodes"),
    ],
)
def test_contradictions_are_named(constraints: Constraints, message: str) -> None:
    with pytest.raises(PartitionError, match="remedy: ") as caught:
        partition(chain(), num_stages=4, constraints=constraints)
    assert message in str(caught.value)


def test_split_points_keep_the_constraints() -> None:
    points = ["blocks.2", "blocks.4"]
    plan = partition(chain(), split_points=points, constraints=Constraints(first=["blocks.1"]))
    assert [len(s.nodes) for s in plan.stages] == [2, 2, 4]
    with pytest.raises(PartitionError, match="which break the constraints"):
        partition(chain(), split_points=points, constraints=Constraints(first=["blocks.2"]))


def test_large_graphs_are_cut_beside_what_is_alone() -> None:
    profile = chain(1500)
    constraints = Constraints(alone=["n700"], first=["n3"], last=["n1490"])
    plan = partition(profile, num_stages=5, constraints=constraints, objective="bottleneck", time_budget_s=0.5)
    assert obeys(plan.stage_of, constraints, 5)
