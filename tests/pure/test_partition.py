"""`partition`: what a plan says is true, it can be saved, and every wrong call is a named error."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest

from autopipe.cost import CostGraph, build_cost_graph
from autopipe.errors import PartitionError
from autopipe.partition import partition
from autopipe.partition.baselines import equal_nodes, equal_parameters, equal_time, pipedream
from autopipe.plan import Plan
from profiler.records import LinkProfile, NodeProfile, ParameterProfile, Profile
from scenarios.random_profiles import random_profile
from tests.pure.partition_reference import crossings, loads_us, peaks_bytes, step_us

LINK = LinkProfile(latency_us=1.0, bytes_per_us=500.0, overlap=0.5)


@pytest.mark.parametrize("seed", range(25))
def test_the_figures_of_a_plan_follow_from_its_stages(seed: int) -> None:
    profile = random_profile(seed, 16, groups=seed % 2 == 0)
    K, M = 1 + seed % 4, 1 + seed % 7
    plan = partition(profile, num_stages=K, num_microbatches=M, link=LINK, time_budget_s=0.2)
    stage = plan.stage_of
    assert set(stage) == {node.name for node in profile.nodes}
    assert all(stage[name] <= stage[node.name] for node in profile.nodes for name in node.inputs)
    assert plan.step_us == pytest.approx(step_us(profile, stage, K, M, LINK), rel=1e-9)
    assert plan.bottleneck_us == pytest.approx(max(loads_us(profile, stage, K, LINK)), rel=1e-9)
    assert [s.peak_bytes for s in plan.stages] == pytest.approx(peaks_bytes(profile, stage, K, M), abs=1.0)
    assert {(t.source, t.target, name) for t in plan.transfers for name in t.nodes} == {
        (source, target, name) for name, source, target in crossings(profile, stage)
    }
    assert plan.lower_bound_us <= plan.step_us * (1 + 1e-12)
    assert all(plan.step_us <= b.step_us * (1 + 1e-9) for b in plan.baselines)
    assert 0 <= plan.bubble <= 1
    for s in plan.stages:
        assert set(s.params) == {p for node in profile.nodes if stage[node.name] == s.index for p in node.params}
        assert list(s.nodes) == [node.name for node in profile.nodes if stage[node.name] == s.index]


@pytest.mark.parametrize("seed", range(10))
def test_groups_are_never_cut_and_ties_name_their_stages(seed: int) -> None:
    profile = random_profile(seed, 18, groups=True)
    plan = partition(profile, num_stages=3, link=LINK, time_budget_s=0.2)
    stage = plan.stage_of
    by_group: dict[str, set[int]] = {}
    for node in profile.nodes:
        if node.group is not None:
            by_group.setdefault(node.group, set()).add(stage[node.name])
    assert all(len(stages) == 1 for stages in by_group.values())
    readers: dict[str, set[int]] = {}
    for node in profile.nodes:
        for name in node.params:
            readers.setdefault(name, set()).add(stage[node.name])
    assert plan.ties == {name: tuple(sorted(s)) for name, s in readers.items() if len(s) > 1}


def test_a_plan_survives_json() -> None:
    plan = partition(random_profile(3, 12), num_stages=3, link=LINK, memory_limit=1e9)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_same_seed_gives_the_same_plan() -> None:
    profile = random_profile(11, 40)
    first, second = (partition(profile, num_stages=4, link=LINK, seed=5, time_budget_s=0.3) for _ in range(2))
    assert first == second


def test_a_profile_with_the_required_fields_alone_can_be_planned() -> None:
    node = {"forward_us": 1.0, "backward_us": 2.0, "output_bytes": 8}
    data = {
        "schema": "autopipe.profile/1",
        "nodes": [{"name": f"n{i}", "inputs": [f"n{i - 1}"] if i else [], **node} for i in range(6)],
    }
    plan = partition(Profile.from_json(data), num_stages=3, objective="bottleneck")
    assert [len(s.nodes) for s in plan.stages] == [2, 2, 2]
    assert not plan.link.measured
    assert not plan.estimated  # the times in it are taken as measured; the link has its own label


def test_split_points_override_and_show_their_price() -> None:
    profile = random_profile(2, 18)
    plan = partition(profile, split_points=["layer2", "layer4.part1"], link=LINK)
    assert plan.num_stages == 3
    assert [s.first_module for s in plan.stages] == ["layer0.part0", "layer2.part0", "layer4.part1"]
    price = {b.name: b.step_us for b in plan.baselines}["without the constraints"]
    assert price <= plan.step_us


def heavy(num_nodes: int = 6, param_bytes: int = 1000) -> Profile:
    return Profile(
        nodes=tuple(
            NodeProfile(
                name=f"n{i}",
                inputs=(f"n{i - 1}",) if i else (),
                forward_us=1.0,
                backward_us=2.0,
                output_bytes=10,
                saved_bytes=100,
                module=f"blocks.{i}",
                params=(f"blocks.{i}.weight",),
            )
            for i in range(num_nodes)
        ),
        parameters={f"blocks.{i}.weight": ParameterProfile(bytes=param_bytes) for i in range(num_nodes)},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_stages": 0}, "num_stages=0; expected an integer, at least 1"),
        ({"num_stages": -2}, "num_stages=-2"),
        ({"num_stages": 2.0}, "num_stages=2.0"),
        ({}, "neither num_stages nor split_points"),
        ({"num_stages": 7}, "num_stages=7 for a graph of 6 nodes"),
        ({"num_stages": 2, "num_microbatches": 0}, "num_microbatches=0"),
        ({"num_stages": 2, "data_parallel": 0}, "data_parallel=0"),
        ({"num_stages": 2, "overlap": 1.5}, "overlap 1.5; expected a share from 0"),
        ({"num_stages": 2, "link": LinkProfile(latency_us=0, bytes_per_us=-1)}, "-1 bytes/us; expected"),
        ({"num_stages": 2, "optimizer": "adamn"}, "did you mean 'adam'"),
        ({"num_stages": 2, "optimizer": -1.0}, "optimizer=-1.0"),
        ({"num_stages": 2, "zero_stage": 2}, "zero_stage=2; expected 0 or 1"),
        ({"num_stages": 2, "schedule": "1f1c"}, "did you mean '1f1b'"),
        ({"num_stages": 2, "objective": "speed"}, "expected one of step, bottleneck"),
        ({"num_stages": 2, "memory_limit": 0}, "memory_limit=0"),
        ({"split_points": ["block.3"]}, "did you mean 'blocks.3'"),
        ({"split_points": ["blocks.0"]}, "'blocks.0' begins where the whole model does"),
        ({"split_points": ["blocks.3", "blocks.3"]}, "begins where 'blocks.3' does"),
        ({"num_stages": 2, "split_points": ["blocks.2", "blocks.3"]}, "2 split points for num_stages=2"),
    ],
)
def test_a_wrong_call_is_a_named_error(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PartitionError, match="remedy: ") as caught:
        partition(heavy(), **arguments)
    assert message in str(caught.value)


def test_too_little_memory_names_the_stage_what_it_lacks_and_what_would_help() -> None:
    with pytest.raises(PartitionError) as caught:
        partition(heavy(param_bytes=2**20), num_stages=2, memory_limit=10 * 2**20, num_microbatches=2)
    message = str(caught.value)
    assert "stage 0 of 2 needs 12.0 MiB (parameters 3.0, gradients 3.0, optimizer state 6.0" in message
    assert "2.0 MiB more than it has" in message
    assert "3 stages" in message
    assert "ZeRO-1" in message
    fits = partition(heavy(param_bytes=2**20), num_stages=3, memory_limit=10 * 2**20, num_microbatches=2)
    assert max(s.peak_bytes for s in fits.stages) <= 10 * 2**20


def test_a_limit_below_one_nodes_parameters_says_so() -> None:
    with pytest.raises(PartitionError, match="the static part alone does not fit"):
        partition(heavy(param_bytes=2**20), num_stages=6, memory_limit=2**20, optimizer="sgd", num_microbatches=1)


def test_zero_1_divides_the_optimizer_state_by_the_replicas() -> None:
    plain = partition(heavy(), num_stages=2, data_parallel=4)
    sharded = partition(heavy(), num_stages=2, data_parallel=4, zero_stage=1)
    assert plain.stages[0].optimizer_bytes == 4 * sharded.stages[0].optimizer_bytes


def test_one_stage_holds_everything() -> None:
    plan = partition(heavy(), num_stages=1, num_microbatches=3)
    assert plan.step_us == pytest.approx(3 * 6 * 3.0)
    assert plan.proved
    assert plan.transfers == ()


def test_a_memory_limit_changes_the_split() -> None:
    profile = heavy(8)
    uneven = dataclasses.replace(
        profile, nodes=tuple(dataclasses.replace(n, forward_us=1.0 + 5 * (i > 4)) for i, n in enumerate(profile.nodes))
    )
    free = partition(uneven, num_stages=2, num_microbatches=2, objective="bottleneck")
    limit = max(s.peak_bytes for s in free.stages) - 1
    capped = partition(uneven, num_stages=2, num_microbatches=2, objective="bottleneck", memory_limit=limit)
    assert max(s.peak_bytes for s in capped.stages) <= limit
    assert capped.bottleneck_us >= free.bottleneck_us


@pytest.mark.parametrize("seed", range(20))
def test_pipedreams_dp_equals_brute_force_over_its_own_cost(seed: int) -> None:
    profile = random_profile(seed, 9, chain=True)
    graph = build_cost_graph(profile, LINK)
    K, n = 2 + seed % 3, graph.num_nodes
    sent = np.zeros(n)
    np.add.at(sent, graph.producer, (graph.tensor_bytes + graph.gradient_bytes) / LINK.bytes_per_us)

    def cost(bounds: tuple[int, ...]) -> float:
        stages = [graph.work_us[i:j].sum() for i, j in itertools.pairwise(bounds)]
        return max([*stages, *(sent[i - 1] for i in bounds[1:-1])])

    best = min(cost((0, *cuts, n)) for cuts in itertools.combinations(range(1, n), K - 1))
    stage_of = pipedream(graph, K)
    assert cost((0, *np.flatnonzero(np.diff(stage_of)) + 1, n)) == pytest.approx(best)


@pytest.mark.parametrize("method", [equal_nodes, equal_parameters, equal_time, pipedream])
def test_every_baseline_fills_every_stage(method: Callable[[CostGraph, int], np.ndarray]) -> None:
    for seed in range(20):
        graph = build_cost_graph(random_profile(seed, 12, groups=True), LINK)
        for num_stages in range(1, graph.num_nodes + 1):
            stage_of = method(graph, num_stages)
            assert sorted(set(stage_of.tolist())) == list(range(num_stages))
            assert (np.diff(stage_of) >= 0).all()


def test_too_little_memory_names_recompute_where_it_would_help() -> None:
    profile = dataclasses.replace(
        heavy(8), nodes=tuple(dataclasses.replace(n, saved_bytes=2**20, output_bytes=10) for n in heavy(8).nodes)
    )
    arguments = {"num_stages": 2, "num_microbatches": 4, "memory_limit": 6 * 2**20}
    with pytest.raises(PartitionError, match=r"recompute of activations \(recompute='auto'\)"):
        partition(profile, recompute="none", **arguments)
    plan = partition(profile, **arguments)
    assert max(s.peak_bytes for s in plan.stages) <= arguments["memory_limit"]
    again = plan.stages[0]
    assert again.recompute
    assert again.backward_us > 2 * again.forward_us
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_limit_that_recompute_does_not_reach_offers_none() -> None:
    with pytest.raises(PartitionError) as caught:
        partition(heavy(param_bytes=2**20), num_stages=2, memory_limit=10 * 2**20, num_microbatches=2)
    assert "recompute" not in str(caught.value)
