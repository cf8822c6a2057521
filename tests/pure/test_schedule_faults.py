"""Faults planted in a right schedule: the checker rejects each, and says which it is."""

import dataclasses

import pytest

from autopipe.errors import ScheduleError
from autopipe.schedule import Action, Edge, Schedule, build_schedule, check_schedule

EDGES = [Edge(0, 1), Edge(1, 2), Edge(2, 3), Edge(0, 3)]


@pytest.fixture
def schedule() -> Schedule:
    return build_schedule("1f1b", 4, 6, EDGES, reductions=[(0, 3)])


def changed(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    lists = list(schedule.actions)
    lists[rank] = tuple(actions)
    return dataclasses.replace(schedule, actions=tuple(lists))


def moved(schedule: Schedule, rank: int, action: str, before: str) -> Schedule:
    actions = list(schedule.actions[rank])
    actions.remove(Action.parse(action))
    actions.insert(actions.index(Action.parse(before)), Action.parse(action))
    return changed(schedule, rank, actions)


def without(schedule: Schedule, rank: int, action: str) -> Schedule:
    return changed(schedule, rank, [a for a in schedule.actions[rank] if str(a) != action])


def with_extra(schedule: Schedule, rank: int, action: str, at: int) -> Schedule:
    actions = list(schedule.actions[rank])
    actions.insert(at, Action.parse(action))
    return changed(schedule, rank, actions)


def swapped(schedule: Schedule, rank: int, first: str, second: str) -> Schedule:
    names = {first: second, second: first}
    return changed(schedule, rank, [Action.parse(names.get(str(a), str(a))) for a in schedule.actions[rank]])


def rejects(schedule: Schedule, match: str) -> None:
    with pytest.raises(ScheduleError, match=match):
        check_schedule(schedule)


def test_lost_send(schedule: Schedule) -> None:
    rejects(without(schedule, 0, "0SEND_F3>1"), "micro-batch 3 sent 0 times.*SEND_F from stage 0 to 1")


def test_lost_receive(schedule: Schedule) -> None:
    rejects(without(schedule, 0, "0RECV_B2>3"), "micro-batch 2 received 0 times.*SEND_B from stage 3 to 0")


def test_duplicated_receive(schedule: Schedule) -> None:
    rejects(with_extra(schedule, 1, "1RECV_F2>0", -1), "micro-batch 2 received 2 times")


def test_transfer_without_an_edge(schedule: Schedule) -> None:
    rejects(with_extra(schedule, 1, "1SEND_F2>3", -1), "no such edge")


def test_use_before_arrival(schedule: Schedule) -> None:
    rejects(moved(schedule, 2, "2F0", before="2RECV_F0>1"), "use before the receive from stage 1.*2F0")


def test_send_before_its_compute(schedule: Schedule) -> None:
    rejects(moved(schedule, 0, "0SEND_F0>1", before="0F0"), "send before its tensor is computed.*0SEND_F0>1")


def test_order_swapped_at_one_end(schedule: Schedule) -> None:
    rejects(swapped(schedule, 3, "3RECV_F1>0", "3RECV_F0>0"), "micro-batch 0 sent and 1 received as number 0")


def test_circular_wait(schedule: Schedule) -> None:
    rejects(moved(schedule, 2, "2RECV_B0>3", before="2SEND_F0>3"), r"circular wait: .*rank 2 in 2RECV_B0>3")


def test_skip_that_waits_as_in_a_naive_order() -> None:
    """Waiting for the skip's send before the next forward deadlocks when receives are posted at their use only."""
    right = build_schedule("1f1b", 4, 4, EDGES)
    naive = []
    for actions in right.actions:
        receives = {
            a: [r for r in actions if "RECV" in r.kind and (r.kind[-1], r.microbatch) == (a.kind, a.microbatch)]
            for a in actions
        }
        naive.append(
            tuple(b for a in actions if "RECV" not in a.kind for b in ([*receives[a], a] if a.kind in "FB" else [a]))
        )
    rejects(dataclasses.replace(right, actions=tuple(naive)), "circular wait")


def test_missing_reduction(schedule: Schedule) -> None:
    rejects(without(schedule, 3, "3REDUCE_GRAD0"), "not one 3REDUCE_GRAD0.*rank 3")


def test_early_reduction(schedule: Schedule) -> None:
    rejects(moved(schedule, 3, "3REDUCE_GRAD0", before="3B5"), "before the last backward")


def test_lost_and_doubled_compute(schedule: Schedule) -> None:
    rejects(without(schedule, 1, "1B4"), "1B4 0 times")
    rejects(with_extra(schedule, 1, "1B4", -1), "1B4 2 times")


def test_backward_before_forward() -> None:
    right = build_schedule("1f1b", 1, 2, [])
    rejects(moved(right, 0, "0B0", before="0F0"), "backward before its forward")


def test_weights_before_inputs() -> None:
    right = build_schedule("zb-h1", 2, 3, [Edge(0, 1)])
    rejects(moved(right, 0, "0W1", before="0I1"), "weight gradients before the gradient of the inputs")
    rejects(without(right, 1, "1W2"), "1W2 0 times")


def test_use_before_another_stage_of_the_rank_made_it() -> None:
    right = build_schedule("interleaved", 4, 2, [Edge(0, 1), Edge(1, 2), Edge(2, 3), Edge(0, 2)], num_ranks=2)
    actions = [a for a in right.actions[0] if str(a) not in ("2RECV_F0>1", "2F0")]
    early = [Action.parse("2RECV_F0>1"), Action.parse("2F0"), *actions]
    rejects(changed(right, 0, early), "before stage 0 of this rank made it")


def test_compute_on_the_wrong_rank(schedule: Schedule) -> None:
    lists = (schedule.actions[1], schedule.actions[0], *schedule.actions[2:])
    rejects(dataclasses.replace(schedule, actions=lists), "expected rank 1")


def test_receives_posted_too_far_ahead(schedule: Schedule) -> None:
    rejects(moved(schedule, 3, "3RECV_F2>0", before="3F0"), "3 receives posted")


def test_too_many_live_activations() -> None:
    greedy = build_schedule("gpipe", 2, 4, [Edge(0, 1)])
    rejects(dataclasses.replace(greedy, kind="1f1b"), "live activations")


def test_lists_that_leave_the_global_order(schedule: Schedule) -> None:
    order = list(schedule.order)
    order[0], order[1] = order[1], order[0]
    rejects(dataclasses.replace(schedule, order=tuple(order)), "global order")
