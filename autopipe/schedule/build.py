"""Build a schedule: the actions of every rank, taken from one global order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autopipe.errors import ScheduleError
from autopipe.schedule.actions import Action, Edge, Schedule, restrict
from autopipe.schedule.costs import Costs
from autopipe.schedule.event_graph import EventGraph, issue_times_us, unroll
from autopipe.schedule.kinds import KINDS, SEVERAL_STAGES_A_RANK, dealt_over_ranks


def build_schedule(
    kind: str,
    num_stages: int,
    num_microbatches: int,
    edges: Iterable[Edge],
    *,
    costs: Costs | None = None,
    reductions: Iterable[Sequence[int]] = (),
    num_ranks: int | None = None,
) -> Schedule:
    """Build the schedule of `num_microbatches` micro-batches over `num_stages` stages.

    The lists of the ranks are restrictions of one topological order of all computes, transfers and reductions, so that
    no order of queues can deadlock: the smallest unfinished event can always run. That order is taken from a simulation
    with `costs`; wrong costs make it slower, never wrong. Every rank must pass the same arguments.

    Args:
        kind: `1f1b`, `eager-1f1b`, `gpipe`, `zb-h1`, `interleaved`, or `forward` (no backward: evaluation).
        num_stages, num_microbatches: at least 1 each; fewer micro-batches than stages are fine.
        edges: which stages send to which, each pair once.
        costs: times of the stages and links, in microseconds; None: even stages and fast links.
        reductions: groups of stages whose gradients of a tied parameter are summed after the last backward of each of
            them.
        num_ranks: of `interleaved` and `forward`, the ranks over which the stages are dealt in turn; as many as stages
            otherwise.

    Raises:
        ScheduleError: an unknown kind, ranks that it cannot use, no stage or no micro-batch, an edge or a group that
            the stages do not have.
    """
    edges = tuple(sorted(edges))
    groups = tuple(tuple(sorted(set(group))) for group in reductions)
    num_ranks = num_stages if num_ranks is None else num_ranks
    _validate_numbers(kind, num_stages, num_microbatches, num_ranks)
    _validate_graph(num_stages, edges, groups)
    facts = KINDS[kind]
    orders = facts.orders(num_stages, num_microbatches, num_ranks)
    graph = unroll(orders, edges, forward_only=not facts.has_backward)
    times = issue_times_us(graph, costs or Costs.default(num_stages, edges))
    order = _global_order(graph, times, groups if facts.has_backward else ())
    return Schedule(
        kind=kind,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        edges=edges,
        reductions=groups if facts.has_backward else (),
        actions=restrict(order, len(orders), groups),
        order=order,
    )


def _global_order(graph: EventGraph, times: list[float], groups: tuple[tuple[int, ...], ...]) -> tuple[Action, ...]:
    """Events by time, ties in the topological order of the graph; each reduction after its last backward."""
    by_time = sorted(range(len(times)), key=times.__getitem__)
    last_backward: dict[int, int] = {}
    for position, index in enumerate(by_time):
        if graph.events[index].kind in ("B", "I", "W"):
            last_backward[graph.events[index].stage] = position
    due: dict[int, list[int]] = {}
    for group, stages in enumerate(groups):
        due.setdefault(max(last_backward[s] for s in stages), []).append(group)
    order: list[Action] = []
    for position, index in enumerate(by_time):
        order.append(graph.events[index])
        order += [Action("REDUCE_GRAD", groups[g][0], g) for g in due.get(position, ())]
    return tuple(order)


def _validate_numbers(kind: str, num_stages: int, num_microbatches: int, num_ranks: int) -> None:
    if kind not in KINDS:
        raise ScheduleError(
            f"schedule {kind!r}", expected=f"one of {', '.join(KINDS)}", remedy="choose one of these schedules"
        )
    for name, number in (("num_stages", num_stages), ("num_microbatches", num_microbatches)):
        if number < 1:
            raise ScheduleError(f"{name} = {number}", expected="at least 1", remedy=f"pass a positive {name}")
    if not 1 <= num_ranks <= num_stages or (num_ranks < num_stages and not KINDS[kind].several_stages_a_rank):
        raise ScheduleError(
            f"{num_stages} stages on {num_ranks} ranks under {kind}",
            expected=f"as many ranks as stages, or fewer under {' and '.join(SEVERAL_STAGES_A_RANK)}",
            remedy=f"use the {dealt_over_ranks()} schedule, or another number of stages",
        )


def _validate_graph(num_stages: int, edges: tuple[Edge, ...], groups: tuple[tuple[int, ...], ...]) -> None:
    pairs = [(e.source, e.target) for e in edges]
    for pair in pairs:
        if not 0 <= pair[0] < pair[1] < num_stages:
            raise ScheduleError(
                f"an edge from stage {pair[0]} to {pair[1]}",
                expected=f"an earlier and a later of {num_stages} stages",
                remedy="number the stages in topological order",
            )
    if len(set(pairs)) < len(pairs):
        twice = next(p for p in pairs if pairs.count(p) > 1)
        raise ScheduleError(
            f"the edge from stage {twice[0]} to {twice[1]} twice",
            expected="each pair of stages once",
            remedy="move all tensors between two stages over one edge",
        )
    for stages in groups:
        if not stages or not all(0 <= s < num_stages for s in stages):
            raise ScheduleError(
                f"the reduction group {stages}",
                expected=f"stages from 0 to {num_stages - 1}",
                remedy="name the stages that hold the tied parameter",
            )
