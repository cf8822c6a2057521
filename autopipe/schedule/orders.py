"""Generators of schedules: the order in which each rank computes, without transfers (`kinds.py` lists them)."""

from __future__ import annotations

from itertools import accumulate

from autopipe.schedule.actions import Action

Orders = list[list[Action]]

# 1F1B, 4 stages and 6 micro-batches; a backward takes two columns. A stage starts with as many forwards as there are
# stages from it to the end (warm-up), then does one backward and one forward in turn (steady), then the backwards left
# (cool-down):
#
#     time ─▶
#     stage 0  F0 F1 F2 F3 .. .. .. .. .. .. B0 B0 F4 B1 B1 F5 B2 B2 .. B3 B3 .. B4 B4 .. B5 B5
#     stage 1  .. F0 F1 F2 .. .. .. .. B0 B0 F3 B1 B1 F4 B2 B2 F5 B3 B3 .. B4 B4 .. B5 B5 .. ..
#     stage 2  .. .. F0 F1 .. .. B0 B0 F2 B1 B1 F3 B2 B2 F4 B3 B3 F5 B4 B4 .. B5 B5 .. .. .. ..
#     stage 3  .. .. .. F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 F4 B4 B4 F5 B5 B5 .. .. .. .. .. ..
#
# A stage never holds more activations than it did at the end of its warm-up, however many micro-batches follow.


def one_forward_one_backward(num_stages: int, num_microbatches: int, num_ranks: int) -> Orders:
    """1F1B (PipeDream-Flush; Narayanan et al. 2021, https://arxiv.org/abs/2006.09503)."""
    return [_alternating(s, min(num_stages - s, num_microbatches), num_microbatches) for s in range(num_ranks)]


# Eager 1F1B, 3 stages and 6 micro-batches, a message as long as a forward. Under 1F1B every backward of stage 0 waits
# for a way there and back (34 columns in all); here so many forwards have been sent before that every rank has
# something to do meanwhile:
#
#     time ─▶
#     stage 0  F0 F1 F2 F3 F4 .. .. .. .. .. .. B0 B0 F5 B1 B1 .. B2 B2 .. B3 B3 .. B4 B4 .. B5 B5
#     stage 1  .. .. F0 F1 F2 .. .. .. B0 B0 F3 B1 B1 F4 B2 B2 F5 B3 B3 .. B4 B4 .. B5 B5 .. .. ..
#     stage 2  .. .. .. .. F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 F4 B4 B4 F5 B5 B5 .. .. .. .. .. ..


def eager_one_forward_one_backward(num_stages: int, num_microbatches: int, num_ranks: int) -> Orders:
    """1F1B with a longer warm-up, which hides the transfers (Zhuang et al. 2022, https://arxiv.org/abs/2211.05322)."""
    return [_alternating(s, eager_warm_up(num_stages, num_microbatches, s), num_microbatches) for s in range(num_ranks)]


def eager_warm_up(num_stages: int, num_microbatches: int, stage: int) -> int:
    """Forwards before the first backward of a stage, and so the most activations that it holds."""
    return min(2 * (num_stages - stage) - 1, num_microbatches)


def _alternating(stage: int, warm_up: int, num_microbatches: int) -> list[Action]:
    """Forwards, then a backward and a forward in turn, then the backwards that are left."""
    order = [Action("F", stage, m) for m in range(warm_up)]
    for m in range(num_microbatches):
        order.append(Action("B", stage, m))
        if m + warm_up < num_microbatches:
            order.append(Action("F", stage, m + warm_up))
    return order


def gpipe(num_stages: int, num_microbatches: int, num_ranks: int) -> Orders:
    """All forwards, then all backwards (Huang et al. 2019, https://arxiv.org/abs/1811.06965)."""
    return [
        [Action("F", s, m) for m in range(num_microbatches)] + [Action("B", s, m) for m in range(num_microbatches)]
        for s in range(num_ranks)
    ]


def forward_only(num_stages: int, num_microbatches: int, num_ranks: int) -> Orders:
    """Evaluation: forwards alone, each micro-batch through all stages of a rank before the next."""
    return [
        [Action("F", s, m) for m in range(num_microbatches) for s in range(rank, num_stages, num_ranks)]
        for rank in range(num_ranks)
    ]


# ZB-H1, 3 stages and 5 micro-batches. The backward is split: I, the gradient of the inputs, which the stage before
# waits for, and W, the gradient of the weights, which nobody waits for. Stage k puts W off by k micro-batches, and so
# fills the cool-down:
#
#     time ─▶
#     stage 0  F0 F1 F2 .. .. I0 W0 F3 I1 W1 F4 I2 W2 I3 W3 I4 W4
#     stage 1  .. F0 F1 .. I0 F2 I1 W0 F3 I2 W1 F4 I3 W2 I4 W3 W4
#     stage 2  .. .. F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 F4 I4 W2 W3 W4
#
# No stage holds more than the K activations that stage 0 holds under 1F1B (W still needs them).


def zero_bubble_h1(num_stages: int, num_microbatches: int, num_ranks: int) -> Orders:
    """ZB-H1 (Qi et al. 2023, https://arxiv.org/abs/2401.10241)."""
    orders = []
    for stage in range(num_ranks):
        warm_up = min(num_stages - stage, num_microbatches)
        order = [Action("F", stage, m) for m in range(warm_up)]
        for m in range(num_microbatches):
            order.append(Action("I", stage, m))
            if m >= stage:
                order.append(Action("W", stage, m - stage))
            if m + warm_up < num_microbatches:
                order.append(Action("F", stage, m + warm_up))
        first_left = max(num_microbatches - stage, 0)
        orders.append(order + [Action("W", stage, m) for m in range(first_left, num_microbatches)])
    return orders


# Interleaved 1F1B, 2 ranks with 2 stages each and 4 micro-batches; stage:micro-batch, a backward as b and both:
#
# time ─▶
# rank 0  0:0 0:1 2:0 2:1 0:2 ... b20 b20 0:3 b21 b21 2:2 b00 b00 2:3 b01 b01 ... b22 b22 ... b23 b23 b02 b02 b03 b03
# rank 1  ... 1:0 1:1 3:0 b30 b30 3:1 b31 b31 1:2 b10 b10 1:3 b11 b11 3:2 b32 b32 3:3 b33 b33 b12 b12 b13 b13 ... ...
#
# Micro-batches go in groups of at least as many as ranks: a rank runs a group through its first stage, then through its
# next. The warm-up is longer, but filling and draining waits for stages that are V times shorter, V being the stages of
# a rank.


def interleaved(num_stages: int, num_microbatches: int, num_ranks: int) -> Orders:
    """1F1B with several stages a rank (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473), for any number of
    micro-batches."""
    groups = _groups(num_microbatches, num_ranks)
    num_rounds = -(-num_stages // num_ranks)
    orders = []
    for rank in range(num_ranks):
        # If the ranks do not divide the stages, the order is that of the next number that they divide, without the
        # stages that are not there: what is left of an order that does not deadlock cannot deadlock.
        stages = range(rank, num_rounds * num_ranks, num_ranks)
        forwards = [Action("F", s, m) for group in groups for s in stages for m in group]
        backwards = [Action("B", s, m) for group in groups for s in reversed(stages) for m in group]
        warm_up = interleaved_warm_up(num_stages, num_microbatches, num_ranks, rank)
        order = forwards[:warm_up]
        for i, backward in enumerate(backwards):
            order += [backward, *forwards[i + warm_up : i + warm_up + 1]]
        orders.append([action for action in order if action.stage < num_stages])
    return orders


def interleaved_warm_up(num_stages: int, num_microbatches: int, num_ranks: int, rank: int) -> int:
    """Forwards before the first backward of a rank, and so the most activations that it holds."""
    num_rounds = -(-num_stages // num_ranks)
    longest = len(_groups(num_microbatches, num_ranks)[0])
    return min(2 * (num_ranks - rank - 1) + (num_rounds - 1) * longest + 1, num_rounds * num_microbatches)


def _groups(num_microbatches: int, num_ranks: int) -> list[range]:
    """Consecutive micro-batches in groups of nearly equal size, at least as many as ranks if there are so many."""
    count = max(1, num_microbatches // num_ranks)
    sizes = [num_microbatches // count + (i < num_microbatches % count) for i in range(count)]
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
