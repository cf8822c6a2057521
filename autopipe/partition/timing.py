"""The time of a step under the cost model: costs of the stages in, simulated microseconds out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autopipe.cost import StageCosts
from autopipe.schedule.kinds import DEFAULT
from autopipe.simulate import step_time_us

Links = Mapping[tuple[int, int], tuple[float, float | None]]


def simulated_step_us(costs: StageCosts, num_microbatches: int, schedule: str = DEFAULT) -> float:
    """Time from the first forward to the last backward of all micro-batches, and to the last sum over replicas; the
    optimizer apart."""
    forward, backward = costs.busy_us()
    return step_time_us(
        forward.tolist(), backward.tolist(), costs.links(), num_microbatches, schedule, reduce_us=reductions_us(costs)
    )


def reductions_us(costs: StageCosts) -> list[float]:
    """Of each stage, the sum of its gradients over the replicas; empty where there is one replica."""
    return [] if costs.reduce_us is None else costs.reduce_us.tolist()


def ranked_step_us(costs: StageCosts, num_microbatches: int, schedule: str) -> float:
    """The same without the skips that cannot delay anything: the simulator prepares itself for each new set of
    links."""
    forward, backward = (times.tolist() for times in costs.busy_us())
    links = without_harmless_skips(forward, backward, costs.links())
    return step_time_us(forward, backward, links, num_microbatches, schedule, reduce_us=reductions_us(costs))


def without_harmless_skips(forward_us: Sequence[float], backward_us: Sequence[float], links: Links) -> Links:
    """The links less those skips that are never waited for.

    A message from s to t that skips stages is there before the one that goes through all stages between, if its own
    link is free when it is sent (its time is at most that of the stage that sends it) and takes no longer than that way
    round.
    """
    kept = dict(links)
    for (s, t), (there, back) in links.items():
        steps = [links.get((k, k + 1)) for k in range(s, t)]
        if t == s + 1 or None in steps:
            continue
        chain = [step for step in steps if step is not None]
        round_there = sum(step[0] for step in chain) + sum(forward_us[s + 1 : t])
        returns = [step[1] for step in chain]
        known = [link_us for link_us in returns if link_us is not None]
        round_back = sum(known) + sum(backward_us[s + 1 : t])
        harmless = there <= min(forward_us[s], round_there)
        if back is not None:
            harmless &= len(known) == len(returns) and back <= min(backward_us[t], round_back)
        if harmless:
            del kept[s, t]
    return kept
