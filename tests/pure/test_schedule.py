"""Schedules of every small size: they pass the checker, and they end under an independent model of each layout of
queues."""

import itertools
import random
import time
from collections import defaultdict, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopipe.errors import EngineError, ScheduleError
from autopipe.schedule import Action, Costs, Edge, Schedule, build_schedule, check_schedule

KINDS = ("1f1b", "eager-1f1b", "gpipe", "zb-h1", "forward")


def chain(num_stages: int) -> list[Edge]:
    return [Edge(s, s + 1) for s in range(num_stages - 1)]


def random_graph(num_stages: int, rnd: random.Random, *, keep_chain: bool) -> list[Edge]:
    pairs = itertools.combinations(range(num_stages), 2)
    return [Edge(s, t, rnd.random() < 0.7) for s, t in pairs if (keep_chain and t == s + 1) or rnd.random() < 0.4]


def random_costs(num_stages: int, edges: list[Edge], rnd: random.Random) -> Costs:
    time_us = lambda: rnd.choice([0.0, 1.0, rnd.uniform(0.1, 5.0)])
    return Costs(
        forward_us=tuple(time_us() for _ in range(num_stages)),
        backward_us=tuple(time_us() for _ in range(num_stages)),
        links={(e.source, e.target): (time_us(), time_us()) for e in edges},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_chain_and_longest_skip(kind: str) -> None:
    for num_stages, num_microbatches in itertools.product(range(1, 9), range(1, 17)):
        edges = chain(num_stages)
        check_schedule(build_schedule(kind, num_stages, num_microbatches, edges))
        if num_stages > 2:
            skip = [*edges, Edge(0, num_stages - 1)]
            check_schedule(build_schedule(kind, num_stages, num_microbatches, skip, reductions=[(0, num_stages - 1)]))


@pytest.mark.parametrize("kind", ["1f1b", "eager-1f1b", "gpipe", "zb-h1"])
def test_every_single_skip(kind: str) -> None:
    for num_stages in range(3, 9):
        skips = [(s, t) for s, t in itertools.combinations(range(num_stages), 2) if t > s + 1]
        for skip, num_microbatches in itertools.product(skips, sorted({1, num_stages - 1, num_stages + 1, 16})):
            for backward in (True, False):
                edges = [*chain(num_stages), Edge(*skip, backward)]
                check_schedule(build_schedule(kind, num_stages, num_microbatches, edges, reductions=[skip]))


@pytest.mark.parametrize("kind", KINDS)
def test_random_stage_graphs_costs_and_reductions(kind: str) -> None:
    rnd = random.Random(0)
    for num_stages, num_microbatches in itertools.product(range(2, 9), range(1, 17)):
        edges = random_graph(num_stages, rnd, keep_chain=rnd.random() < 0.7)
        groups = [rnd.sample(range(num_stages), rnd.randint(1, num_stages)) for _ in range(rnd.randint(0, 3))]
        costs = random_costs(num_stages, edges, rnd)
        schedule = build_schedule(kind, num_stages, num_microbatches, edges, costs=costs, reductions=groups)
        check_schedule(schedule)


def ends_under(schedule: Schedule, queues: str) -> bool:
    """Plays the schedule with rendezvous sends, transfers in the given queues and computes in the queue of their
    rank."""

    def queue_of(rank: int, action: Action) -> tuple[object, ...]:
        if action.kind == "REDUCE_GRAD":
            return (rank, "rank") if queues in ("rank", "rank+compute") else (rank, "reduce")
        if action.peer < 0:
            return (rank, "rank") if queues == "rank+compute" else (rank, "compute")
        sending = action.kind.startswith("SEND")
        ends = (action.stage, action.peer) if sending else (action.peer, action.stage)
        return {
            "edge": (rank, *ends),
            "pair": (rank, *sorted(ends)),
            "rank": (rank, "rank"),
            "rank+compute": (rank, "rank"),
        }[queues]

    lines: dict[tuple[object, ...], deque[Action]] = defaultdict(deque)
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            lines[queue_of(rank, action)].append(action)
    done: set[Action] = set()
    backward = [e for e in schedule.edges if e.backward]

    backward_kind = "I" if schedule.kind == "zb-h1" else "B"

    def arrival(kind: str, a: Action, source: int) -> Action:
        """What must be done on this rank before `a` can read what `source` made."""
        if schedule.rank_of(source) == schedule.rank_of(a.stage):
            return Action("F" if kind == "RECV_F" else backward_kind, source, a.microbatch)
        return Action(kind, a.stage, a.microbatch, source)

    def needs(a: Action) -> list[Action]:
        if a.kind == "F":
            return [arrival("RECV_F", a, e.source) for e in schedule.edges if e.target == a.stage]
        if a.kind in ("B", "I"):
            received = [arrival("RECV_B", a, e.target) for e in backward if e.source == a.stage]
            return [*received, Action("F", a.stage, a.microbatch)]
        if a.kind == "REDUCE_GRAD":
            return [Action(backward_kind, a.stage, m) for m in range(schedule.num_microbatches)]
        if a.kind == "W":
            return [Action("I", a.stage, a.microbatch)]
        return [Action("F" if a.kind == "SEND_F" else backward_kind, a.stage, a.microbatch)] if "SEND" in a.kind else []

    while any(lines.values()):
        ready = {line[0]: q for q, line in lines.items() if line and all(n in done for n in needs(line[0]))}
        finished: set[Action] = set()
        for action in ready:
            if action.kind.startswith("SEND") and action.matching in ready:
                finished |= {action, action.matching}
            elif action.kind == "REDUCE_GRAD":
                stages = schedule.reductions[action.microbatch]
                group = {a for acts in schedule.actions for a in acts if a.kind == "REDUCE_GRAD" and a.stage in stages}
                group = {a for a in group if a.microbatch == action.microbatch}
                finished |= group if group <= ready.keys() else set()
            elif action.peer < 0:
                finished.add(action)
        if not finished:
            return False
        for action in finished:
            lines[ready[action]].popleft()
        done |= finished
    return True


@pytest.mark.parametrize("queues", ["edge", "pair", "rank", "rank+compute"])
def test_ends_under_every_layout_of_queues(queues: str) -> None:
    rnd = random.Random(1)
    for kind, num_stages, num_microbatches in itertools.product(KINDS, (1, 2, 3, 4, 6), (1, 2, 3, 5, 9)):
        for edges in (chain(num_stages), random_graph(num_stages, rnd, keep_chain=True)):
            groups = [(0, num_stages - 1), tuple(range(num_stages))] if kind != "forward" else []
            schedule = build_schedule(kind, num_stages, num_microbatches, edges, reductions=groups)
            assert ends_under(schedule, queues), f"{kind} {num_stages} {num_microbatches} {edges}"


@pytest.mark.parametrize("queues", ["edge", "pair", "rank", "rank+compute"])
def test_interleaved_ends_under_every_layout_of_queues(queues: str) -> None:
    rnd = random.Random(3)
    for num_ranks, num_stages, num_microbatches in itertools.product((1, 2, 3), (3, 4, 6, 7), (1, 3, 4, 7)):
        for edges in (chain(num_stages), random_graph(num_stages, rnd, keep_chain=True)):
            groups = [(0, num_stages - 1), tuple(range(num_stages))]
            schedule = build_schedule(
                "interleaved", num_stages, num_microbatches, edges, reductions=groups, num_ranks=num_ranks
            )
            assert ends_under(schedule, queues), f"{num_ranks} {num_stages} {num_microbatches} {edges}"


@given(st.integers(1, 8), st.integers(1, 12), st.sampled_from(KINDS), st.randoms(use_true_random=False))
def test_any_costs_give_a_proved_schedule(k: int, m: int, kind: str, rnd: random.Random) -> None:
    edges = random_graph(k, rnd, keep_chain=rnd.random() < 0.5)
    check_schedule(build_schedule(kind, k, m, edges, costs=random_costs(k, edges, rnd)))


def test_every_interleaving_of_stages() -> None:
    """Any number of stages on any number of ranks, groups that do not divide, local edges, and edges that skip."""
    rnd = random.Random(2)
    for num_ranks in range(1, 7):
        for num_stages, num_microbatches in itertools.product(range(num_ranks, 3 * num_ranks + 2), range(1, 14)):
            extra = [Edge(0, num_stages - 1)] if num_stages > 2 else []
            for edges in (chain(num_stages), chain(num_stages) + extra):
                groups = [(0, num_stages - 1)] if rnd.random() < 0.5 else []
                check_schedule(
                    build_schedule(
                        "interleaved", num_stages, num_microbatches, edges, num_ranks=num_ranks, reductions=groups
                    )
                )
            if num_stages <= 8:
                graph = random_graph(num_stages, rnd, keep_chain=rnd.random() < 0.5)
                costs = random_costs(num_stages, graph, rnd)
                for kind in ("interleaved", "forward"):
                    check_schedule(
                        build_schedule(kind, num_stages, num_microbatches, graph, costs=costs, num_ranks=num_ranks)
                    )


def test_two_tied_stages_of_one_rank_reduce_once_there() -> None:
    schedule = build_schedule("interleaved", 4, 4, chain(4), num_ranks=2, reductions=[(0, 2, 3)])
    found = [[str(a) for a in actions if a.kind == "REDUCE_GRAD"] for actions in schedule.actions]
    assert found == [["0REDUCE_GRAD0"], ["3REDUCE_GRAD0"]]


def test_one_f_one_b_is_torchs_order() -> None:
    schedule = build_schedule("1f1b", 3, 4, chain(3))
    computes = [" ".join(str(a) for a in acts if a.peer < 0) for acts in schedule.actions]
    assert computes == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_sends_follow_their_compute_and_receives_come_ahead() -> None:
    schedule = build_schedule("1f1b", 2, 4, chain(2))
    assert [str(a) for a in schedule.actions[1][:5]] == ["1RECV_F0>0", "1RECV_F1>0", "1F0", "1B0", "1SEND_B0>0"]
    assert [str(a) for a in schedule.actions[0][:4]] == ["0F0", "0SEND_F0>1", "0F1", "0SEND_F1>1"]


def test_same_arguments_give_the_same_schedule() -> None:
    edges = [*chain(5), Edge(0, 4), Edge(1, 3, backward=False)]
    again = build_schedule("1f1b", 5, 7, reversed(edges), reductions=[(4, 0)])
    assert build_schedule("1f1b", 5, 7, edges, reductions=[(0, 4)]) == again


def test_edge_without_gradients_carries_none_back() -> None:
    schedule = build_schedule("1f1b", 3, 4, [Edge(0, 1), Edge(1, 2), Edge(0, 2, backward=False)])
    back = {(a.stage, a.peer) for a in schedule.order if a.kind == "SEND_B"}
    assert back == {(1, 0), (2, 1)}


def test_action_spelling_round_trips() -> None:
    for text in ("0F3", "12B0", "1I2", "1W2", "0SEND_F3>2", "2RECV_F3>0", "2SEND_B3>0", "0RECV_B3>2", "0REDUCE_GRAD1"):
        assert str(Action.parse(text)) == text
    for text in ("F3", "0F", "0F3>1", "0SEND_F3", "0REDUCE_GRAD1>2", "0X3", "0F3 "):
        with pytest.raises(ScheduleError, match="0SEND_F3>2"):
            Action.parse(text)


def test_wrong_arguments_are_named() -> None:
    for call, match in (
        (lambda: build_schedule("2f2b", 2, 2, chain(2)), "2f2b"),
        (lambda: build_schedule("1f1b", 0, 2, []), "num_stages = 0"),
        (lambda: build_schedule("1f1b", 2, 0, chain(2)), "num_microbatches = 0"),
        (lambda: build_schedule("1f1b", 2, 2, [Edge(1, 0)]), "from stage 1 to 0"),
        (lambda: build_schedule("1f1b", 2, 2, [Edge(0, 2)]), "from stage 0 to 2"),
        (lambda: build_schedule("1f1b", 2, 2, [Edge(0, 1), Edge(0, 1, False)]), "twice"),
        (lambda: build_schedule("1f1b", 4, 2, chain(4), num_ranks=2), "4 stages on 2 ranks under 1f1b"),
        (lambda: build_schedule("interleaved", 2, 2, chain(2), num_ranks=3), "2 stages on 3 ranks"),
        (lambda: build_schedule("1f1b", 2, 2, chain(2), reductions=[(0, 2)]), "reduction group"),
    ):
        with pytest.raises(EngineError, match=match):
            call()


def test_checking_is_fast() -> None:
    edges = [*chain(8), Edge(0, 7), Edge(2, 5)]
    schedule = build_schedule("1f1b", 8, 64, edges)
    times = []
    for _ in range(3):
        start = time.process_time()
        check_schedule(schedule)
        times.append(time.process_time() - start)
    assert min(times) < 0.1
