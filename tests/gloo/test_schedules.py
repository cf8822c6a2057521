"""Schedules take the time that the simulator says, on stages that sleep; a backward in two parts keeps the memory that
it says."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopipe.schedule import Costs, Edge, build_schedule
from autopipe.simulate import simulate_schedule
from scenarios.sleepers import Sleeper, mean_square
from tests.gloo.launch import run_ranks

NAP_S, NUM_RANKS, NUM_MICROBATCHES = 0.012, 4, 8
STAGES_A_RANK = {"1f1b": 1, "zb-h1": 1, "interleaved": 2}


def simulated_s(schedule: str) -> float:
    """The step of stages of two sleepers, or of one under interleaving."""
    num_stages = NUM_RANKS * STAGES_A_RANK[schedule]
    edges, nap_us = [Edge(s, s + 1) for s in range(num_stages - 1)], 1e6 * NAP_S * 2 / STAGES_A_RANK[schedule]
    costs = Costs(forward_us=(nap_us,) * num_stages, backward_us=(2 * nap_us,) * num_stages)
    actions = build_schedule(schedule, num_stages, NUM_MICROBATCHES, edges, costs=costs, num_ranks=NUM_RANKS)
    return simulate_schedule(actions, costs).makespan_us / 1e6


def _sleep_through(num_steps: int) -> dict[str, float]:
    """The shortest step under each schedule."""
    import autopipe

    dist.init_process_group("gloo")
    shortest = {}
    for schedule, several in STAGES_A_RANK.items():
        each = 2 // several
        engine = autopipe.pipeline(
            nn.Sequential(*(Sleeper(NAP_S, NAP_S, NAP_S) for _ in range(2 * NUM_RANKS))),
            loss_fn=mean_square,
            num_stages=NUM_RANKS * several,
            num_microbatches=NUM_MICROBATCHES,
            schedule=schedule,
            split_points=[str(i) for i in range(each, 2 * NUM_RANKS, each)],
            self_check=False,
        )
        batch, times = torch.randn(NUM_MICROBATCHES, 16), []
        for _ in range(num_steps):
            dist.barrier()
            start = time.perf_counter()
            engine.train_batch(batch, target=batch)
            times.append(time.perf_counter() - start)
        shortest[schedule] = min(times[1:])
        engine.close()
    return shortest


def test_interleaved_and_zero_bubble_beat_1f1b_as_simulated() -> None:
    simulated = {name: simulated_s(name) for name in STAGES_A_RANK}
    assert simulated["zb-h1"] < simulated["interleaved"] < simulated["1f1b"]
    ranks = run_ranks(_sleep_through, NUM_RANKS, 4)
    # Ranks end their part at different times: the step is that of the slowest.
    took = {name: max(rank[name] for rank in ranks) for name in simulated}
    for name, expected in simulated.items():  # benchmarks/engine.py has the figures of a quiet machine
        assert 0.99 * expected < took[name] < 1.2 * expected, (name, took[name], expected)
    assert took["zb-h1"] < took["1f1b"] and took["interleaved"] < took["1f1b"]


class Counted(nn.Module):
    """A layer that keeps something for its backward, and a count of what is kept."""

    alive, most = 0, 0

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return Keep.apply(x) * self.w  # type: ignore[no-any-return]


class Token:
    """Lives as long as the graph of a micro-batch."""

    def __init__(self) -> None:
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        Counted.alive -= 1


class Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token = Token()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _count_alive(schedules: list[str]) -> dict[str, int]:
    import autopipe

    dist.init_process_group("gloo")
    most = {}
    for schedule in schedules:
        engine = autopipe.pipeline(
            nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), Counted()) for _ in range(NUM_RANKS))),
            loss_fn=mean_square,
            num_microbatches=12,
            schedule=schedule,
            split_points=[str(i) for i in range(1, NUM_RANKS)],
            self_check=False,
        )
        batch = torch.randn(12, 16)
        engine.train_batch(batch, target=batch)
        gc.collect()  # what profiling has left is not counted out in the next step
        Counted.alive = Counted.most = 0
        engine.train_batch(batch, target=batch)
        assert Counted.alive == 0
        most[schedule] = Counted.most
        engine.close()
    return most


def test_as_many_micro_batches_are_alive_as_the_simulator_says() -> None:
    ranks = run_ranks(_count_alive, NUM_RANKS, ["1f1b", "eager-1f1b", "gpipe", "zb-h1"])
    edges = [Edge(s, s + 1) for s in range(NUM_RANKS - 1)]
    costs = Costs(forward_us=(1.0,) * NUM_RANKS, backward_us=(2.0,) * NUM_RANKS, activation_bytes=(1,) * NUM_RANKS)
    for schedule in ("1f1b", "eager-1f1b", "gpipe", "zb-h1"):
        simulated = simulate_schedule(build_schedule(schedule, NUM_RANKS, 12, edges, costs=costs), costs).peak_bytes
        assert tuple(rank[schedule] for rank in ranks) == simulated
