"""The order in which each rank computes, without transfers: one generator for each kind of schedule."""

from __future__ import annotations

from collections.abc import Callable

from autopipe.schedule.actions import Action

Orders = list[list[Action]]

# 1F1B, 4 stages and 6 micro-batches; a backward takes two columns. A stage starts with as many forwards as there are stages
# from it to the end (warm-up), then does one backward and one forward in turn (steady), then the backwards left (cool-down):
#
#     time ─▶
#     stage 0  F0 F1 F2 F3 .. .. .. .. .. .. B0 B0 F4 B1 B1 F5 B2 B2 .. B3 B3 .. B4 B4 .. B5 B5
#     stage 1  .. F0 F1 F2 .. .. .. .. B0 B0 F3 B1 B1 F4 B2 B2 F5 B3 B3 .. B4 B4 .. B5 B5 .. ..
#     stage 2  .. .. F0 F1 .. .. B0 B0 F2 B1 B1 F3 B2 B2 F4 B3 B3 F5 B4 B4 .. B5 B5 .. .. .. ..
#     stage 3  .. .. .. F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 F4 B4 B4 F5 B5 B5 .. .. .. .. .. ..
#
# A stage never holds more activations than it did at the end of its warm-up, however many micro-batches follow.


def one_forward_one_backward(num_stages: int, num_microbatches: int) -> Orders:
    """1F1B (PipeDream-Flush; Narayanan et al. 2021, https://arxiv.org/abs/2006.09503)."""
    orders = []
    for stage in range(num_stages):
        warm_up = min(num_stages - stage, num_microbatches)
        order = [Action("F", stage, m) for m in range(warm_up)]
        for m in range(num_microbatches):
            order.append(Action("B", stage, m))
            if m + warm_up < num_microbatches:
                order.append(Action("F", stage, m + warm_up))
        orders.append(order)
    return orders


def gpipe(num_stages: int, num_microbatches: int) -> Orders:
    """All forwards, then all backwards (Huang et al. 2019, https://arxiv.org/abs/1811.06965)."""
    return [
        [Action("F", s, m) for m in range(num_microbatches)] + [Action("B", s, m) for m in range(num_microbatches)]
        for s in range(num_stages)
    ]


def forward_only(num_stages: int, num_microbatches: int) -> Orders:
    """Evaluation: forwards alone."""
    return [[Action("F", s, m) for m in range(num_microbatches)] for s in range(num_stages)]


ORDERS: dict[str, Callable[[int, int], Orders]] = {
    "1f1b": one_forward_one_backward,
    "gpipe": gpipe,
    "forward": forward_only,
}
