"""Costs, schedule and timeline of a plan, as `autopipe simulate` shows them."""

from __future__ import annotations

from autopipe.plan import Plan
from autopipe.schedule import Costs, Edge, Schedule, build_schedule
from autopipe.schedule.costs import CPU_SPLIT_NODE_US, CPU_SPLIT_SHARE, SPLIT_SHARE, Link
from autopipe.schedule.kinds import KINDS
from autopipe.simulate.play import count_live, simulate_schedule
from autopipe.simulate.timeline import Timeline
from profiler.records import LinkProfile


def simulate(
    plan: Plan, *, num_microbatches: int | None = None, schedule: str | None = None, link: LinkProfile | None = None
) -> Timeline:
    """The timeline of a training step under a plan.

    Args:
        plan: stages, transfers, and the link between them.
        num_microbatches, schedule, link: instead of the plan's own. A micro-batch keeps its size: more of them are a
            larger batch.

    Raises:
        ScheduleError: an unknown schedule, or no micro-batch.
    """
    return simulate_schedule(
        plan_schedule(plan, num_microbatches=num_microbatches, schedule=schedule, link=link), plan_costs(plan, link)
    )


def plan_schedule(
    plan: Plan,
    *,
    num_microbatches: int | None = None,
    schedule: str | None = None,
    link: LinkProfile | None = None,
    num_ranks: int | None = None,
) -> Schedule:
    """The schedule of a plan: an edge for each transfer, and a reduction for each set of stages that share a parameter.

    `num_ranks` deals the stages over other ranks than the plan does.
    """
    groups = sorted({tuple(sorted(set(stages))) for stages in plan.ties.values() if len(set(stages)) > 1})
    return build_schedule(
        plan.schedule if schedule is None else schedule,
        plan.num_stages,
        plan.num_microbatches if num_microbatches is None else num_microbatches,
        [Edge(t.source, t.target, t.backward_bytes > 0) for t in plan.transfers],
        costs=plan_costs(plan, link, num_ranks),
        reductions=groups,
        num_ranks=num_ranks or plan.num_ranks or None,
    )


def plan_costs(plan: Plan, link: LinkProfile | None = None, num_ranks: int | None = None) -> Costs:
    """The costs of a plan's stages and links for one micro-batch.

    Of a transfer that takes t (latency + bytes over bandwidth), the share that is not hidden, (1 - overlap) t, is added
    to the compute of both its ends: of an activation to their forwards, of a gradient to their backwards. The rest
    holds the link. `num_ranks` deals the stages over other ranks than the plan does.
    """
    forward = [stage.forward_us for stage in plan.stages]
    backward = [stage.backward_us for stage in plan.stages]
    links: dict[tuple[int, int], Link] = {}
    ranks = num_ranks or plan.num_ranks or plan.num_stages
    for transfer in plan.transfers:
        if transfer.source % ranks == transfer.target % ranks:  # both on one rank: nothing is sent
            links[transfer.source, transfer.target] = (0.0, 0.0 if transfer.backward_bytes else None)
            continue
        over = link or transfer.link or plan.link
        there = over.transfer_us(transfer.forward_bytes)
        back = over.transfer_us(transfer.backward_bytes) if transfer.backward_bytes else 0.0
        for stage in (transfer.source, transfer.target):
            forward[stage] += (1 - over.overlap) * there
            backward[stage] += (1 - over.overlap) * back
        hidden_back = over.overlap * back if transfer.backward_bytes else None
        links[transfer.source, transfer.target] = (over.overlap * there, hidden_back)
    in_flight = _in_flight(plan)
    return Costs(
        forward_us=tuple(forward),
        backward_us=tuple(backward),
        links=links,
        activation_bytes=tuple(s.activation_bytes // n for s, n in zip(plan.stages, in_flight, strict=True)),
        static_bytes=tuple(s.peak_bytes - s.activation_bytes for s in plan.stages),
        reduce_us=tuple(s.reduce_us for s in plan.stages),
        split_us=_split_us(plan),
    )


def _split_us(plan: Plan) -> tuple[float, ...]:
    """Extra time of each stage's backward in two parts; a stage that sends no gradient back has but one.

    On a GPU the host walks the graph while the device computes.
    """
    divided = {t.target for t in plan.transfers if t.backward_bytes}
    share, node_us = (CPU_SPLIT_SHARE, CPU_SPLIT_NODE_US) if plan.device.startswith("cpu") else (SPLIT_SHARE, 0.0)
    return tuple(
        share * stage.backward_us + node_us * len(stage.nodes) if stage.index in divided else 0.0
        for stage in plan.stages
    )


def _in_flight(plan: Plan) -> tuple[int, ...]:
    """Micro-batches that the plan's `activation_bytes` count: those that its own schedule keeps alive at once."""
    kind, K, M = KINDS[plan.schedule], plan.num_stages, plan.num_microbatches
    if not kind.several_stages_a_rank:
        return tuple(kind.live(K, M, K, k) for k in range(K))
    return count_live(
        build_schedule(plan.schedule, plan.num_stages, plan.num_microbatches, [], num_ranks=plan.num_ranks or None)
    )
