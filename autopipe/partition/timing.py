"""The time of a step under the cost model: costs of the stages in, simulated microseconds out."""

from __future__ import annotations

from autopipe.cost import CostGraph, IntArray, StageCosts, stage_costs


def simulated_step_us(costs: StageCosts, num_microbatches: int, schedule: str = "1f1b") -> float:
    """Time from the first forward to the last backward of all micro-batches; the optimizer step is not in it."""
    forward = (costs.forward_us + costs.forward_exposed_us).tolist()
    backward = (costs.backward_us + costs.backward_exposed_us).tolist()
    if schedule == "gpipe":
        return _gpipe_us(forward, backward, costs.links(), num_microbatches)
    return _one_f_one_b_us(forward, backward, costs.links(), num_microbatches)


def step_us(graph: CostGraph, stage_of: IntArray, num_stages: int, num_microbatches: int, schedule: str) -> float:
    """Simulated time of a step under an assignment of nodes to stages."""
    return simulated_step_us(stage_costs(graph, stage_of, num_stages), num_microbatches, schedule)


Links = dict[tuple[int, int], tuple[float, float | None]]


def _one_f_one_b_us(forward: list[float], backward: list[float], links: Links, num_microbatches: int) -> float:
    """1F1B: stage k runs min(K - k, M) forwards, then a backward and a forward in turn, each as soon as its inputs are there."""
    K, M = len(forward), num_microbatches
    warm = [min(K - k, M) for k in range(K)]
    ahead = [[(t, links[k, t][0]) for t in range(K) if (k, t) in links] for k in range(K)]
    behind = [[(s, links[s, k][1]) for s in range(K) if links.get((s, k), (0, None))[1] is not None] for k in range(K)]
    needs_forward = [[s for s in range(K) if (s, k) in links] for k in range(K)]
    needs_backward = [[t for t in range(K) if links.get((k, t), (0, None))[1] is not None] for k in range(K)]
    arrived: dict[tuple[int, int, int], float] = {}
    returned: dict[tuple[int, int, int], float] = {}
    busy_link: dict[tuple[int, int], float] = {}
    done_forward, done_backward, free = [0] * K, [0] * K, [0.0] * K
    remaining = 2 * M * K
    while remaining:
        before = remaining
        for k in range(K):
            while done_backward[k] < M:
                i, j = done_forward[k], done_backward[k]
                if i < M and i - j < warm[k]:
                    if any((s, k, i) not in arrived for s in needs_forward[k]):
                        break
                    ready = max((arrived[s, k, i] for s in needs_forward[k]), default=0.0)
                    free[k] = max(free[k], ready) + forward[k]
                    done_forward[k] += 1
                    for t, link_us in ahead[k]:
                        busy_link[k, t] = max(busy_link.get((k, t), 0.0), free[k]) + link_us
                        arrived[k, t, i] = busy_link[k, t]
                else:
                    if any((k, t, j) not in returned for t in needs_backward[k]):
                        break
                    ready = max((returned[k, t, j] for t in needs_backward[k]), default=0.0)
                    free[k] = max(free[k], ready) + backward[k]
                    done_backward[k] += 1
                    for s, back_us in behind[k]:
                        busy_link[k, s] = max(busy_link.get((k, s), 0.0), free[k]) + (back_us or 0.0)
                        returned[s, k, j] = busy_link[k, s]
                remaining -= 1
        assert remaining < before, "1F1B over an acyclic stage graph always moves on"
    return max(free)


def _gpipe_us(forward: list[float], backward: list[float], links: Links, num_microbatches: int) -> float:
    """GPipe: every stage runs all forwards, then all backwards, each as soon as its input is there (Huang et al., 2019)."""
    K = len(forward)
    free = [0.0] * K
    sent: dict[tuple[int, int], float] = {}
    back: dict[tuple[int, int], float] = {}
    for _ in range(num_microbatches):
        arrived = [0.0] * K
        for k in range(K):
            free[k] = max(free[k], arrived[k]) + forward[k]
            for edge, (link_us, _) in links.items():
                if edge[0] == k:
                    sent[edge] = max(sent.get(edge, 0.0), free[k]) + link_us
                    arrived[edge[1]] = max(arrived[edge[1]], sent[edge])
    for _ in range(num_microbatches):
        arrived = [0.0] * K
        for k in reversed(range(K)):
            free[k] = max(free[k], arrived[k]) + backward[k]
            for edge, (_, link_us) in links.items():
                if edge[1] == k and link_us is not None:
                    back[edge] = max(back.get(edge, 0.0), free[k]) + (link_us or 0.0)
                    arrived[edge[0]] = max(arrived[edge[0]], back[edge])
    return max(free)
