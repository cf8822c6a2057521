"""The simulator against hand-made timelines, an independent recurrence, the fast step time and the lower bound."""

import dataclasses
import itertools
import random
import statistics
import time
from typing import Any

import pytest

from autopipe.plan import Plan, StagePlan, Transfer
from autopipe.schedule import Edge, build_schedule, check_schedule
from autopipe.simulate import Costs, h_bound_us, plan_costs, plan_schedule, simulate, simulate_schedule, step_time_us
from profiler.records import LinkProfile


def chain(num_stages: int) -> list[Edge]:
    return [Edge(s, s + 1) for s in range(num_stages - 1)]


def random_problem(rnd: random.Random, num_stages: int, *, skips: bool) -> tuple[list[Edge], Costs]:
    spread, link = rnd.choice([0.1, 0.3, 0.7]), rnd.choice([0.0, 0.05, 0.2, 1.0])
    pairs = [
        (s, t) for s, t in itertools.combinations(range(num_stages), 2) if t == s + 1 or (skips and rnd.random() < 0.3)
    ]
    edges = [Edge(s, t, t == s + 1 or rnd.random() < 0.7) for s, t in pairs]
    forward = [1 + spread * rnd.uniform(-1, 1) for _ in range(num_stages)]
    return edges, Costs(
        forward_us=tuple(forward),
        backward_us=tuple(2 * f * (1 + 0.2 * spread * rnd.uniform(-1, 1)) for f in forward),
        links={
            (e.source, e.target): (link * rnd.uniform(0.5, 1.5), link * rnd.uniform(0.5, 1.5) if e.backward else None)
            for e in edges
        },
    )


def test_even_stages_take_the_textbook_time() -> None:
    for kind, num_stages, num_microbatches in itertools.product(("1f1b", "gpipe"), (1, 2, 4, 8), (1, 2, 4, 16)):
        costs = Costs(forward_us=(1.0,) * num_stages, backward_us=(2.0,) * num_stages)
        schedule = build_schedule(kind, num_stages, num_microbatches, chain(num_stages), costs=costs)
        timeline = simulate_schedule(schedule, costs)
        assert timeline.makespan_us == 3.0 * (num_microbatches + num_stages - 1)
        assert timeline.mean_bubble == pytest.approx((num_stages - 1) / (num_microbatches + num_stages - 1))


def test_eager_1f1b_hides_messages_that_take_up_to_a_half_of_a_micro_batch() -> None:
    for num_stages, num_microbatches in itertools.product((2, 3, 4, 8), (8, 16, 21)):
        for message_us in (0.1, 1.0, 1.5):
            links = {(k, k + 1): (message_us, message_us) for k in range(num_stages - 1)}
            costs = Costs(forward_us=(1.0,) * num_stages, backward_us=(2.0,) * num_stages, links=links)
            took = {
                kind: simulate_schedule(
                    build_schedule(kind, num_stages, num_microbatches, chain(num_stages), costs=costs), costs
                ).makespan_us
                for kind in ("1f1b", "eager-1f1b")
            }
            once_there_and_back = 2 * (num_stages - 1) * message_us
            textbook = 3.0 * (num_microbatches + num_stages - 1) + once_there_and_back
            assert took["eager-1f1b"] == pytest.approx(textbook)
            assert took["1f1b"] > textbook + message_us


def test_zero_bubble_and_interleaved_reach_their_textbook_times() -> None:
    for num_ranks, num_microbatches in itertools.product((1, 2, 4, 8), (8, 9, 16, 21)):
        costs = Costs(forward_us=(1.0,) * num_ranks, backward_us=(2.0,) * num_ranks)
        zero_bubble = build_schedule("zb-h1", num_ranks, num_microbatches, chain(num_ranks), costs=costs)
        assert simulate_schedule(zero_bubble, costs).makespan_us == 3.0 * num_microbatches + num_ranks - 1
        for rounds in (1, 2, 3):
            K = num_ranks * rounds
            costs = Costs(forward_us=(1.0,) * K, backward_us=(2.0,) * K)
            schedule = build_schedule("interleaved", K, num_microbatches, chain(K), costs=costs, num_ranks=num_ranks)
            time_us = simulate_schedule(schedule, costs).makespan_us
            assert time_us == 3.0 * (num_microbatches * rounds + num_ranks - 1)


def test_what_is_handed_over_within_a_rank_waits_for_its_maker() -> None:
    costs = Costs(forward_us=(1.0,) * 4, backward_us=(2.0,) * 4, links={(0, 1): (9.0, 9.0), (2, 3): (9.0, 9.0)})
    edges = [Edge(0, 1), Edge(0, 2), Edge(2, 3)]
    schedule = build_schedule("interleaved", 4, 2, edges, costs=costs, num_ranks=2)
    check_schedule(schedule)
    start = {(e.kind, e.stage, e.microbatch): (e.start_us, e.end_us) for e in simulate_schedule(schedule, costs).events}
    assert start["F", 2, 1][0] >= start["F", 0, 1][1]
    assert start["B", 0, 1][0] >= start["B", 2, 1][1]


def test_one_micro_batch_goes_through_links_one_after_the_other() -> None:
    costs = Costs(forward_us=(1.0, 2.0), backward_us=(3.0, 4.0), links={(0, 1): (0.5, 0.25)})
    timeline = simulate_schedule(build_schedule("1f1b", 2, 1, chain(2), costs=costs), costs)
    assert [(e.kind, e.stage, e.start_us, e.end_us) for e in timeline.events] == [
        ("F", 0, 0.0, 1.0),
        ("SEND_F", 0, 1.0, 1.5),
        ("F", 1, 1.5, 3.5),
        ("B", 1, 3.5, 7.5),
        ("SEND_B", 1, 7.5, 7.75),
        ("B", 0, 7.75, 10.75),
    ]


def test_a_slow_link_carries_one_transfer_at_a_time() -> None:
    costs = Costs(forward_us=(1.0, 1.0), backward_us=(0.0, 0.0), links={(0, 1): (10.0, 0.0)})
    timeline = simulate_schedule(build_schedule("forward", 2, 5, chain(2), costs=costs), costs)
    assert timeline.makespan_us == 1 + 5 * 10 + 1


def recurrence_us(costs: Costs, num_microbatches: int) -> float:
    """1F1B over a chain, written down stage by stage without schedules; receives without limit, so never slower."""
    K, M = len(costs.forward_us), num_microbatches
    orders = []
    for k in range(K):
        warm, order = min(M, K - k), []
        order += [("F", m) for m in range(warm)]
        for m in range(M):
            order += [("B", m)] + ([("F", m + warm)] if m + warm < M else [])
        orders.append(order)
    at, clock = [0] * K, [0.0] * K
    arrived: dict[Any, float] = {}
    link: dict[Any, float] = {}
    while any(at[k] < 2 * M for k in range(K)):
        for k in range(K):
            if at[k] == 2 * M:
                continue
            kind, m = orders[k][at[k]]
            waits = (kind == "F" and k > 0) or (kind == "B" and k < K - 1)
            if waits and (kind, k, m) not in arrived:
                continue
            clock[k] = (
                max(clock[k], arrived.get((kind, k, m), 0.0))
                + (costs.forward_us if kind == "F" else costs.backward_us)[k]
            )
            at[k] += 1
            to = k + 1 if kind == "F" else k - 1
            if 0 <= to < K:
                hold = costs.links[min(k, to), max(k, to)][kind == "B"]
                link[kind, k] = max(clock[k], link.get((kind, k), 0.0)) + hold
                arrived[kind, to, m] = link[kind, k]
    return max(clock)


def test_against_an_independent_recurrence() -> None:
    """Two receives ahead are enough: a chain is at most 2% slower than with receives without limit, as a rule not at
    all."""
    rnd, slower = random.Random(3), []
    for _ in range(200):
        num_stages, num_microbatches = rnd.randint(1, 8), rnd.randint(1, 24)
        edges, costs = random_problem(rnd, num_stages, skips=False)
        timeline = simulate_schedule(build_schedule("1f1b", num_stages, num_microbatches, edges, costs=costs), costs)
        slower.append(timeline.makespan_us / recurrence_us(costs, num_microbatches) - 1)
    assert min(slower) > -1e-12
    assert max(slower) < 0.02
    assert statistics.median(slower) < 1e-12


@pytest.mark.parametrize("kind", ["1f1b", "eager-1f1b", "gpipe", "forward", "zb-h1", "interleaved"])
def test_fast_step_time_equals_the_simulated(kind: str) -> None:
    rnd = random.Random(4)
    for trial in range(150):
        num_stages, num_microbatches = rnd.randint(1, 9), rnd.randint(1, 20)
        edges, costs = random_problem(rnd, num_stages, skips=trial % 2 == 0)
        ranks = rnd.randint(1, num_stages) if kind in ("interleaved", "forward") else num_stages
        if trial % 3 == 0 and kind != "forward":
            costs = dataclasses.replace(costs, reduce_us=tuple(rnd.uniform(0, 9) for _ in range(num_stages)))
        schedule = build_schedule(kind, num_stages, num_microbatches, edges, costs=costs, num_ranks=ranks)
        times = (costs.forward_us, costs.backward_us, costs.links)
        fast = step_time_us(*times, num_microbatches, kind, num_ranks=ranks, reduce_us=costs.reduce_us)
        assert fast == simulate_schedule(schedule, costs).makespan_us


def test_step_time_is_fast() -> None:
    forward, links = [1.0] * 16, {(k, k + 1): (0.1, 0.1) for k in range(15)}
    step_time_us(forward, forward, links, 64)
    start = time.process_time()
    for _ in range(10):
        step_time_us(forward, forward, links, 64)
    assert (time.process_time() - start) / 10 < 0.01


def test_lower_bound_holds_and_is_close() -> None:
    rnd, errors = random.Random(5), []
    for _ in range(1000):
        num_stages, num_microbatches = rnd.choice([2, 3, 4, 6, 8, 16]), rnd.choice([1, 2, 4, 8, 16, 32, 64])
        _, costs = random_problem(rnd, num_stages, skips=False)
        times = (costs.forward_us, costs.backward_us, costs.links, num_microbatches)
        errors.append(h_bound_us(*times) / step_time_us(*times) - 1)
    assert max(errors) < 1e-12
    assert statistics.mean(map(abs, errors)) < 0.015


def test_lower_bound_holds_with_skips_and_missing_edges() -> None:
    rnd = random.Random(6)
    for _ in range(300):
        num_stages, num_microbatches = rnd.randint(2, 8), rnd.randint(1, 24)
        edges, costs = random_problem(rnd, num_stages, skips=True)
        links = {(e.source, e.target): costs.links[e.source, e.target] for e in edges if rnd.random() < 0.7}
        times = (costs.forward_us, costs.backward_us, links, num_microbatches)
        assert h_bound_us(*times) <= step_time_us(*times) * (1 + 1e-12)


def test_memory_follows_the_schedule() -> None:
    costs = Costs(forward_us=(1.0,) * 3, backward_us=(2.0,) * 3, activation_bytes=(10, 20, 30), static_bytes=(1, 2, 3))
    peak = lambda kind, m: simulate_schedule(build_schedule(kind, 3, m, chain(3)), costs).peak_bytes
    assert peak("1f1b", 8) == (31, 42, 33)
    assert peak("1f1b", 2) == (21, 42, 33)
    assert peak("gpipe", 8) == (81, 162, 243)
    assert peak("forward", 8) == (1, 2, 3)
    assert peak("zb-h1", 8) == (31, 62, 93)
    assert peak("eager-1f1b", 8) == (51, 62, 33)


def plan(**changes: object) -> Plan:
    stages = [
        StagePlan(index=k, nodes=(f"n{k}",), forward_us=10.0, backward_us=20.0, peak_bytes=500, activation_bytes=300)
        for k in range(3)
    ]
    transfers = (
        Transfer(source=0, target=1, nodes=("n0",), forward_bytes=400, backward_bytes=400),
        Transfer(source=1, target=2, nodes=("n1",), forward_bytes=400, backward_bytes=400),
        Transfer(source=0, target=2, nodes=("n0",), forward_bytes=100, backward_bytes=0),
    )
    values: dict[str, object] = {
        "graph_hash": "g",
        "num_stages": 3,
        "num_microbatches": 4,
        "stages": tuple(stages),
        "transfers": transfers,
        "ties": {"a": (0, 2), "b": (2, 0), "c": (1,)},
        "link": LinkProfile(latency_us=1.0, bytes_per_us=100.0, overlap=0.75),
    }
    return Plan(**{**values, **changes})  # type: ignore[arg-type]


def test_costs_of_a_plan() -> None:
    costs = plan_costs(plan())
    assert costs.links == {(0, 1): (3.75, 3.75), (1, 2): (3.75, 3.75), (0, 2): (1.5, None)}
    assert costs.forward_us == pytest.approx((10 + 1.25 + 0.5, 10 + 2 * 1.25, 10 + 1.25 + 0.5))
    assert costs.backward_us == pytest.approx((21.25, 22.5, 21.25))
    assert costs.activation_bytes == (100, 150, 300)
    assert costs.static_bytes == (200, 200, 200)


def test_simulate_a_plan_and_what_if() -> None:
    schedule = plan_schedule(plan())
    check_schedule(schedule)
    assert schedule.reductions == ((0, 2),)
    assert {(e.source, e.target): e.backward for e in schedule.edges} == {(0, 1): True, (1, 2): True, (0, 2): False}
    base = simulate(plan())
    assert base.peak_bytes == (500, 500, 500)
    assert simulate(plan(), num_microbatches=8).makespan_us > base.makespan_us
    assert simulate(plan(), num_microbatches=8).mean_bubble < base.mean_bubble
    assert simulate(plan(), schedule="gpipe").peak_bytes == (600, 800, 1400)
    assert simulate(plan(), link=LinkProfile(latency_us=0.0, bytes_per_us=1e9)).makespan_us < base.makespan_us
