"""The search over layouts: never slower than a plan of an exhaustive small grid, within memory, on the better side of
the links."""

import dataclasses
import json
from typing import Any

import pytest

from autopipe.cluster import Cluster, Device
from autopipe.errors import ClusterError, PartitionError, ProfileError
from autopipe.partition import partition
from autopipe.partition.cluster.device_layouts import layouts, stage_devices
from autopipe.partition.cluster.strategy_search import SearchSpace, search
from autopipe.plan import Plan
from autopipe.simulate import fastest_schedule, rank_peak_bytes, simulate
from profiler.records import LinkProfile, NodeProfile, ParameterProfile, Profile
from profiler.sizes import at_size, check_sizes

MIB = 2**20
LINK = LinkProfile(latency_us=5.0, bytes_per_us=20_000.0)
SLOW = LinkProfile(latency_us=50.0, bytes_per_us=500.0)


def chain(num_nodes: int = 16, size: int = 1, *, fixed_us: float = 0.0, param_mib: int = 4) -> Profile:
    """A chain of layers, each with parameters; times are `fixed_us` and a part in proportion to the micro-batch
    size."""
    nodes = tuple(
        NodeProfile(
            name=f"n{i}",
            inputs=(f"n{i - 1}",) if i else (),
            forward_us=fixed_us + size * (100.0 + 10 * (i % 3)),
            backward_us=2 * fixed_us + size * (200.0 + 20 * (i % 3)),
            output_bytes=size * MIB,
            saved_bytes=size * 3 * MIB,
            params=(f"p{i}",),
            param_bytes=param_mib * MIB,
        )
        for i in range(num_nodes)
    )
    parameters = {f"p{i}": ParameterProfile(bytes=param_mib * MIB) for i in range(num_nodes)}
    return Profile(nodes=nodes, microbatch_size=size, parameters=parameters, device="test")


def grid(profile: Profile, cluster: Cluster, batch: int) -> list[float]:
    """The steps of all layouts, numbers of micro-batches and schedules, each planned and played by itself."""
    steps = []
    num_devices = len(cluster.devices)
    for D in (d for d in range(1, num_devices + 1) if num_devices % d == 0 and batch % d == 0):
        for layout in layouts(cluster, D):
            for M in (m for m in range(1, batch // D + 1) if batch // D % m == 0):
                sized = at_size([profile], batch // D // M)
                plan = partition(sized, num_stages=layout.num_ranks, num_microbatches=M, link=LINK)
                devices = stage_devices(cluster, layout, layout.num_ranks)
                reduces = [
                    devices.reduce_latency_us[s.index] + devices.reduce_us_per_byte[s.index] * s.gradient_bytes
                    for s in plan.stages
                ]
                stages = tuple(
                    dataclasses.replace(s, reduce_us=float(r)) for s, r in zip(plan.stages, reduces, strict=True)
                )
                transfers = tuple(dataclasses.replace(t, link=devices.link(t.source, t.target)) for t in plan.transfers)
                plan = dataclasses.replace(plan, stages=stages, transfers=transfers)
                steps.append(simulate(fastest_schedule(plan)).makespan_us)
    return steps


@pytest.mark.parametrize(("between", "param_mib"), [(LINK, 1), (SLOW, 64)])
def test_no_plan_of_a_small_grid_is_faster(between: LinkProfile, param_mib: int) -> None:
    profile = chain(param_mib=param_mib)
    cluster = Cluster.even(4, LINK, devices_per_node=2, between=between)
    found = search([profile], cluster, SearchSpace(global_batch=8), time_budget_s=1.0)
    assert found.step_us <= min(grid(profile, cluster, 8)) * (1 + 1e-9)
    assert 0 < found.search_bound_us <= found.step_us
    assert [c.step_us for c in found.candidates] == sorted(c.step_us for c in found.candidates)
    assert found.candidates[0].step_us == found.step_us == pytest.approx(simulate(found).makespan_us, rel=1e-9)
    assert all(c.lower_bound_us <= c.step_us * (1 + 1e-9) for c in found.candidates)
    assert Plan.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert search([profile], cluster, SearchSpace(global_batch=8), time_budget_s=1.0) == found


def test_what_is_dear_stays_within_a_node() -> None:
    cluster = Cluster.even(8, LINK, devices_per_node=4, between=SLOW)
    heavy_parameters = SearchSpace(global_batch=16, data_parallel=4, schedules=("1f1b",))
    found = search([chain(param_mib=64)], cluster, heavy_parameters)
    assert found.candidates[0].placement == "replicas"
    assert found.ranks == (0, 4, 1, 5, 2, 6, 3, 7)
    heavy_tensors = dataclasses.replace(heavy_parameters, data_parallel=2)
    light = dataclasses.replace(chain(param_mib=0), parameters={})
    assert search([light], cluster, heavy_tensors).candidates[0].placement == "stages"


def test_memory_decides_where_it_must() -> None:
    profile = chain(param_mib=64)  # 1 GiB of parameters, 4 GiB with gradients and Adam
    roomy = Cluster.even(4, LINK, device=Device(memory_bytes=8192 * MIB))
    free = search([profile], roomy, SearchSpace(global_batch=16), time_budget_s=1.0)
    small = Cluster.even(4, LINK, device=Device(memory_bytes=1400 * MIB))
    found = search([profile], small, SearchSpace(global_batch=16), time_budget_s=1.0)
    assert found.num_stages >= 2 and found.step_us >= free.step_us
    assert max(rank_peak_bytes(found)) <= 1400 * MIB
    tiny = Cluster.even(4, LINK, device=Device(memory_bytes=500 * MIB))
    with pytest.raises(PartitionError, match=r"no way to use the 4 devices.*remedy"):
        search([profile], tiny, SearchSpace(global_batch=16), time_budget_s=1.0)


def test_uneven_devices_get_work_by_their_speed_and_memory() -> None:
    fast, slow = Device(speed=3.0), Device(speed=1.0)
    cluster = Cluster(nodes=((slow, fast),), within=LINK, between=LINK)
    found = search(
        [chain(32)], cluster, SearchSpace(global_batch=32, data_parallel=1, schedules=("1f1b",)), time_budget_s=1.0
    )
    sizes = [len(stage.nodes) for stage in found.stages]
    assert max(sizes) == pytest.approx(24, abs=2)
    assert found.imbalance < 0.1
    mixed = Cluster(
        nodes=((Device(memory_bytes=600 * MIB), Device(memory_bytes=6000 * MIB)),), within=LINK, between=LINK
    )
    found = search([chain(16, param_mib=32)], mixed, SearchSpace(global_batch=8, data_parallel=1, schedules=("1f1b",)))
    for stage in found.stages:
        assert stage.peak_bytes <= stage.memory_limit_bytes


def test_sizes_are_on_a_line_or_in_proportion_and_say_so() -> None:
    one, four = chain(size=1, fixed_us=50.0), chain(size=4, fixed_us=50.0)
    assert at_size([one, four], 2).nodes == tuple(
        dataclasses.replace(n, measured=False) for n in chain(size=2, fixed_us=50.0).nodes
    )
    assert at_size([one], 2).nodes[0].forward_us == 2 * one.nodes[0].forward_us
    cluster = Cluster.even(4, LINK)
    assert search([one], cluster, SearchSpace(global_batch=16, num_microbatches=1)).scaling == "proportional"
    found = search(check_sizes([four, one]), cluster, SearchSpace(global_batch=16, num_microbatches=2, data_parallel=4))
    assert (found.microbatch_size, found.scaling, found.estimated) == (2, "affine", True)
    # Smaller than measured only where nothing else divides the batch.
    assert search([four], cluster, SearchSpace(global_batch=64)).microbatch_size >= 4
    with pytest.raises(ProfileError, match="two profiles of micro-batch size 1"):
        check_sizes([one, one])
    with pytest.raises(ProfileError, match="other nodes at micro-batch size 4"):
        check_sizes([one, chain(15, size=4)])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_devices": 0}, PartitionError, "num_devices"),
        ({"num_devices": 4, "global_batch": 0}, PartitionError, "global_batch"),
        ({"num_devices": 4, "global_batch": 7, "data_parallel": 2}, PartitionError, "7 samples"),
        ({"num_devices": 4, "num_stages": 3}, PartitionError, "num_stages=3"),
        ({"num_devices": 4, "schedule": "zigzag"}, PartitionError, "schedule"),
        ({"num_devices": 4, "split_points": ["a"]}, PartitionError, "split points"),
        ({"num_devices": 4, "memory_limit": -1}, PartitionError, "memory_limit"),
        ({"num_devices": 9, "cluster": Cluster.even(8, LINK)}, ClusterError, "9 devices of 8"),
        ({"cluster": Cluster.even(8, LINK), "memory_limit": 3}, PartitionError, "memory_limit beside a cluster"),
        ({"num_stages": 2, "global_batch": 8}, PartitionError, "num_devices or cluster"),
    ],
)
def test_wrong_calls_are_named(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        partition(chain(), **arguments)


def test_the_public_call_searches_where_devices_are_given() -> None:
    found = partition(chain(), num_devices=4, link=LINK, global_batch=16, schedule="1f1b")
    assert found.num_stages * found.data_parallel == 4
    assert {c.schedule for c in found.candidates} == {"1f1b"}
    fixed = partition(chain(), num_devices=4, num_stages=2, num_microbatches=4, global_batch=16)
    assert (fixed.num_stages, fixed.data_parallel, fixed.num_microbatches) == (2, 2, 4)
