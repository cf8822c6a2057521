"""A lower bound on the 1F1B step: the longest of the paths that usually decide it.

For stage q, with f, b its forward and backward time and t = f + b, let S be the round-trip work before it and R that
after it (links included), w = K - q its warm-up, rt(q, j) the round trip from q through j and back. Every 1F1B step
takes at least

    H = max_q S + max{ M t,                       the stage is never idle once it has begun
                       f + R + M b,               it waits for the first gradient, then only backwards count
                       M f + R + b,               its last forward has yet to come back
                       [M > w] (M-w+1) t + 2 R,   both of these, and the steady state between
                       [M > w] max_{j > q} f + R + b + n rt(q, j) + (M-1-n d) b }
                                                 rounds through stage j, d micro-batches each

with d = j - q + 1 and n = floor((M-1-w) / d) + 1: B(i) at q, F(i+w) at q, ..., F(i+w) at j, B(i+d) at j, ..., B(i+d) at
q.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autopipe.schedule.costs import Link

NO_PATH = float("-inf")


def h_bound_us(
    forward_us: Sequence[float],
    backward_us: Sequence[float],
    links: Mapping[tuple[int, int], Link],
    num_microbatches: int,
) -> float:
    """A time in microseconds that no 1F1B step over these stages and links goes below; arguments as for `step_time_us`.

    Skips are followed: the work before and after a stage is that of the longest paths of the stage graph.
    """
    K, M = len(forward_us), num_microbatches
    there = [_forward_paths(q, forward_us, links) for q in range(K)]
    back = [_backward_paths(q, backward_us, links) for q in range(K)]
    bound = 0.0
    for q in range(K):
        f, b, w = forward_us[q], backward_us[q], K - q
        before = max(there[i][q] - f for i in range(q + 1)) + max(back[q][i] - b for i in range(q + 1))
        trips = [there[q][j] + back[j][q] for j in range(q, K)]
        after = max(trips) - f - b
        paths = [M * (f + b), f + after + M * b, M * f + after + b]
        if w < M:
            paths.append((M - w + 1) * (f + b) + 2 * after)
            for d in range(2, K - q + 1):
                rounds = (M - 1 - w) // d + 1
                paths.append(f + after + b + rounds * trips[d - 1] + (M - 1 - rounds * d) * b)
        bound = max(bound, before + max(paths))
    return bound


def _forward_paths(start: int, forward_us: Sequence[float], links: Mapping[tuple[int, int], Link]) -> list[float]:
    """Longest time from the start of a forward on stage `start` to its end on each stage; -inf if nothing flows."""
    end = [NO_PATH] * len(forward_us)
    end[start] = forward_us[start]
    for source, target in sorted(links, key=lambda pair: pair[1]):
        end[target] = max(end[target], end[source] + links[source, target][0] + forward_us[target])
    return end


def _backward_paths(start: int, backward_us: Sequence[float], links: Mapping[tuple[int, int], Link]) -> list[float]:
    """Longest time from the start of a backward on stage `start` to its end on each earlier stage; -inf if nothing
    flows."""
    end = [NO_PATH] * len(backward_us)
    end[start] = backward_us[start]
    for source, target in sorted(links, key=lambda pair: -pair[0]):
        link_us = links[source, target][1]
        if link_us is not None:
            end[source] = max(end[source], end[target] + link_us + backward_us[source])
    return end
