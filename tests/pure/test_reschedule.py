"""A plan under another schedule: the times and memory are those that the simulator gives for it."""

import dataclasses
import math
from typing import Any

import pytest

from autopipe.errors import ScheduleError
from autopipe.plan import Plan, StagePlan, Transfer
from autopipe.schedule import Action
from autopipe.schedule.costs import CPU_SPLIT_NODE_US, CPU_SPLIT_SHARE, SPLIT_SHARE
from autopipe.schedule.kinds import TRIED, undivided
from autopipe.simulate import (
    fastest_schedule,
    plan_costs,
    rank_peak_bytes,
    rescheduled,
    schedules_for,
    simulate,
)
from profiler.records import LinkProfile


def plan(num_stages: int = 4, num_microbatches: int = 8, unit_us: float = 1.0, **values: object) -> Plan:
    in_flight = [min(num_stages - k, num_microbatches) for k in range(num_stages)]
    stages = tuple(
        StagePlan(
            index=k,
            nodes=(f"n{k}",),
            forward_us=unit_us,
            backward_us=2 * unit_us,
            peak_bytes=100 + 10 * n,
            activation_bytes=10 * n,
        )
        for k, n in enumerate(in_flight)
    )
    transfers = tuple(
        Transfer(source=k, target=k + 1, nodes=(f"n{k}",), forward_bytes=8, backward_bytes=8)
        for k in range(num_stages - 1)
    )
    return Plan(
        graph_hash="g",
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        stages=stages,
        transfers=transfers,
        lower_bound_us=5.0,
        **values,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("schedule", ["1f1b", "eager-1f1b", "gpipe", "zb-h1"])
def test_times_and_memory_are_those_of_the_simulator(schedule: str) -> None:
    other = rescheduled(plan(), schedule)
    timeline = simulate(other)
    assert other.step_us in (0.0, timeline.makespan_us)  # a plan under its own schedule stays as it is
    assert rank_peak_bytes(other) == timeline.peak_bytes == tuple(s.peak_bytes for s in other.stages)
    assert rescheduled(other, "1f1b").stages == plan().stages


def test_stages_are_dealt_over_fewer_ranks() -> None:
    dealt = fastest_schedule(plan(), num_ranks=2)
    assert (dealt.schedule, dealt.num_ranks, dealt.lower_bound_us) == ("interleaved", 2, 0.0)
    assert dealt.step_us == simulate(dealt).makespan_us == 3.0 * (8 * 2 + 1)


def test_the_fastest_that_fits_is_taken_and_of_equals_the_simplest() -> None:
    assert fastest_schedule(plan(), schedules=["1f1b", "gpipe"]).schedule == "1f1b"
    # Too little memory for either: the one that needs less.
    assert fastest_schedule(plan(memory_limit_bytes=50), schedules=["gpipe", "1f1b"]).schedule == "1f1b"
    assert schedules_for(4, 4)[0] == "1f1b"
    assert schedules_for(4, 2) == ("interleaved",)
    slow = LinkProfile(latency_us=1.0, bytes_per_us=math.inf, overlap=1.0)
    waits = plan(link=slow, step_us=simulate(plan(link=slow)).makespan_us)
    eager = fastest_schedule(waits, schedules=undivided(TRIED[:3]))
    assert eager.schedule == "eager-1f1b"
    assert eager.stages[0].activation_bytes == 70  # of 2 K - 1 = 7 micro-batches
    assert fastest_schedule(dataclasses.replace(waits, memory_limit_bytes=140), schedules=undivided(TRIED[:3])) != eager
    with pytest.raises(ScheduleError, match="2 stages on 4 ranks"):
        fastest_schedule(plan(2), num_ranks=4)


def timed(**values: Any) -> Plan:
    untimed = plan(**values)
    return dataclasses.replace(untimed, step_us=simulate(untimed).makespan_us)


def test_backwards_are_divided_where_that_costs_less_than_the_bubble() -> None:
    assert fastest_schedule(timed()).schedule == "zb-h1"
    many = timed(num_microbatches=400)
    assert fastest_schedule(many) == many  # hardly a bubble
    assert fastest_schedule(timed(unit_us=1000, device="cpu")).schedule == "zb-h1"
    assert fastest_schedule(timed(num_stages=2, unit_us=1000)).schedule == "zb-h1"
    short = timed(num_stages=2, unit_us=1000, device="cpu")
    assert fastest_schedule(short) == short  # on some CPUs the bubble of two stages costs less
    small = timed(unit_us=10, device="cpu")
    assert fastest_schedule(small) == small  # walking a graph takes longer than its stage


def test_a_divided_backward_takes_longer_by_a_share_and_by_the_nodes_of_its_stage() -> None:
    nodes = ((), tuple(f"m{i}" for i in range(49)))
    stages = tuple(
        dataclasses.replace(s, nodes=s.nodes + more) for s, more in zip(plan(2, unit_us=500).stages, nodes, strict=True)
    )
    on_gpu = dataclasses.replace(plan(2, unit_us=500), stages=stages)
    assert plan_costs(on_gpu).split_us == (0.0, SPLIT_SHARE * 1000)  # the host walks the graph meanwhile
    costs = plan_costs(dataclasses.replace(on_gpu, device="cpu"))
    # The first stage sends no gradient back.
    assert costs.split_us == (0.0, CPU_SPLIT_SHARE * 1000 + CPU_SPLIT_NODE_US * 50)
    parts = [costs.duration_us(Action(kind, 1, 0)) for kind in ("I", "W")]
    assert sum(parts) == pytest.approx(costs.duration_us(Action("B", 1, 0)) + costs.split_us[1])
