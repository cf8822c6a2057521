"""Stages that sleep: their schedules' step times on this rank, and what the simulator says of them."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import torch

from autopipe.plan import Plan
from autopipe.schedule import Edge, build_schedule
from autopipe.simulate import plan_costs, simulate_schedule
from benchmarks.pipelines.peers import PEERS, autopipe_step
from benchmarks.pipelines.rounds import plain_stage, timed_rounds
from scenarios.sleepers import Sleeper, mean_square

NAP_S, NUM_MICROBATCHES = 0.01, 8
STAGES_A_RANK = {"1f1b": 1, "eager-1f1b": 1, "zb-h1": 1, "interleaved": 2}


def simulated_s(plan: Plan, nap_s: float) -> float:
    """The step of a plan whose stages sleep, given what a nap takes with the work around it; transfers over the plan's
    link."""
    num_ranks = plan.num_ranks or plan.num_stages
    nap_us = 1e6 * nap_s * 2 * num_ranks / plan.num_stages
    stages = tuple(dataclasses.replace(s, forward_us=nap_us, backward_us=2 * nap_us) for s in plan.stages)
    costs = dataclasses.replace(plan_costs(dataclasses.replace(plan, stages=stages)), split_us=())
    edges = [Edge(s, s + 1) for s in range(plan.num_stages - 1)]
    actions = build_schedule(plan.schedule, plan.num_stages, NUM_MICROBATCHES, edges, costs=costs, num_ranks=num_ranks)
    return simulate_schedule(actions, costs).makespan_us / 1e6


def _layers() -> tuple[list[Any], torch.Tensor]:
    num_ranks = torch.distributed.get_world_size()
    return [Sleeper(NAP_S, NAP_S, NAP_S) for _ in range(2 * num_ranks)], torch.randn(NUM_MICROBATCHES, 16)


def sleeping_schedules(num_rounds: int) -> tuple[dict[str, list[float]], dict[str, Plan], float]:
    """autopipe's schedules in turn: step times, the plans that were run, and what a nap takes by itself, in seconds."""
    layers, batch = _layers()
    num_ranks = torch.distributed.get_world_size()
    steps: dict[str, Any] = {
        name: autopipe_step(
            layers, batch, batch, mean_square, NUM_MICROBATCHES, schedule=name, num_stages=several * num_ranks
        )
        for name, several in STAGES_A_RANK.items()
    }
    times = timed_rounds({**steps, "alone": plain_stage(layers[:2], batch, NUM_MICROBATCHES)}, num_rounds)
    nap_s = statistics.median(times.pop("alone")) / (6 * NUM_MICROBATCHES)
    plans = {name: step.engine.plan for name, step in steps.items()}
    return times, plans, nap_s


def sleeping_peers(peers: tuple[str, ...], num_rounds: int) -> dict[str, list[float]]:
    """The others' 1F1B in turn."""
    layers, batch = _layers()
    return timed_rounds({n: PEERS[n](layers, batch, batch, mean_square, NUM_MICROBATCHES) for n in peers}, num_rounds)
