"""Stages and replicas left open: the engine runs the plan that the search finds for the processes of the launch and the
first batch."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.gloo.launch import run_in_turn
from tests.gloo.plain import plain_step, relative_error

BATCH, WIDTH = 16, 64
WITHIN, BETWEEN = (1.0, 50_000.0), (20.0, 50.0)
"""Latency in microseconds and bytes per microsecond of the links in a node and between two."""


def _wide() -> nn.Module:
    """Much to sum over replicas, little to send between stages."""
    torch.manual_seed(3)
    return nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))


@contextlib.contextmanager
def _fixed_costs(devices_per_node: int) -> Iterator[None]:
    """In the place of what is measured: times of a device that is not here, and the two links, so that the choice is
    the same each time."""
    import profiler
    from autopipe.engine.setup import auto_plan
    from profiler.records import LinkProfile

    def estimated(captured: Any, tensors: Any, *_: Any) -> Any:
        return profiler.estimate(
            captured.graph_module, tensors, device="h100", names=captured.names, graph_hash=captured.graph_hash
        )

    def link(group: Any = None, **_: Any) -> Any:
        latency_us, bytes_per_us = WITHIN if group is None else BETWEEN
        return LinkProfile(latency_us=latency_us, bytes_per_us=bytes_per_us)

    patched = mock.patch.object
    with (
        patched(auto_plan, "profiled", estimated),
        patched(profiler, "measure_link", link),
        mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(devices_per_node)),
    ):
        yield


def _train(devices_per_node: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train under the costs of nodes of so many devices, or with 0 under those that are measured."""
    with _fixed_costs(devices_per_node) if devices_per_node else contextlib.nullcontext():
        return _two_steps(settings)


def _two_steps(settings: dict[str, Any]) -> dict[str, Any]:
    """Train two steps, and the plain model too, whose parameters are then those of the engine."""
    import autopipe

    model = _wide()
    plain, x, target = copy.deepcopy(model), torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    adam = partial(torch.optim.AdamW, lr=1e-3, eps=1e-4)
    engine, optimizer = (
        autopipe.pipeline(model, loss_fn=F.mse_loss, optimizer=adam, **settings),
        adam(plain.parameters()),
    )
    for unknown in ("stage", "num_microbatches"):
        with pytest.raises(autopipe.EngineError, match=r"before the first batch.*remedy"):
            getattr(engine, unknown)
    error = 0.0
    for _ in range(2):
        loss = float(engine.train_batch(x, target=target))
        optimizer.zero_grad()
        plan = engine.plan
        expected = plain_step(plain, (x,), {}, target, F.mse_loss, plan.num_microbatches * plan.data_parallel)
        error = max(error, abs(loss / expected - 1))
        gradients = {n: p.grad for n, p in plain.named_parameters()}
        error = max([error, *(relative_error(p.grad, gradients[n]) for n, p in engine.named_parameters())])
        optimizer.step()
    state = engine.state_dict()
    held = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
    result = {
        "plan": plan,
        "error": max([error, *(relative_error(state[n], p) for n, p in plain.named_parameters())]),
        "place": (engine._state.launch.mesh.replica, engine.stage),
        "num_microbatches": engine.num_microbatches,
        "share_of_states": held / sum(p.numel() for p in engine.parameters()),
    }
    engine.close()
    return result


PARAMETERS = 4 * (WIDTH + 1) * WIDTH * 4
"""Bytes; beside them there are gradients, and the two states of Adam."""
CASES = {
    "measured here": (0, {}),
    "no room for a whole model": (2, {"memory_limit": 3 * PARAMETERS, "zero_stage": 0, "num_microbatches": 2}),
    "no room for the optimizer's states": (4, {"memory_limit": int(1.8 * PARAMETERS), "data_parallel": 2}),
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    return dict(zip(CASES, run_in_turn(4, [(_train, case) for case in CASES.values()], measured=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_run_one_plan_that_uses_all_of_them(found: dict[str, list[Any]], case: str) -> None:
    plan = found[case][0]["plan"]
    P = plan.num_ranks or plan.num_stages
    assert P * plan.data_parallel == 4
    assert plan.candidates
    assert plan.step_us == min(c.step_us for c in plan.candidates)
    order = plan.ranks or tuple(range(4))
    for rank, result in enumerate(found[case]):
        assert result["plan"] == plan
        assert result["place"] == divmod(order.index(rank), P)
        assert result["num_microbatches"] == plan.num_microbatches
        assert result["error"] <= 1e-5


def test_the_plan_is_laid_on_the_nodes_in_the_better_order(found: dict[str, list[Any]]) -> None:
    plan = found["no room for a whole model"][0]["plan"]
    assert (plan.num_stages, plan.data_parallel, plan.num_microbatches) == (2, 2, 2)
    assert plan.ranks == (0, 2, 1, 3)


def test_states_are_sharded_where_memory_demands_it(found: dict[str, list[Any]]) -> None:
    results = found["no room for the optimizer's states"]
    assert (results[0]["plan"].num_stages, results[0]["plan"].zero_stage) == (2, 1)
    for pipeline_rank in {result["place"][1] for result in results}:
        assert sum(r["share_of_states"] for r in results if r["place"][1] == pipeline_rank) == pytest.approx(1)


def test_a_search_is_made_where_stages_and_more_are_left_open() -> None:
    from autopipe.config import PipelineConfig
    from autopipe.engine.setup.auto_plan import left_to_search

    assert left_to_search(PipelineConfig(), 4)
    assert left_to_search(PipelineConfig(num_microbatches=8), 4)
    assert left_to_search(PipelineConfig(data_parallel=2), 4)
    assert not left_to_search(PipelineConfig(), 1)
    assert not left_to_search(PipelineConfig(num_stages=2), 4)
    assert not left_to_search(PipelineConfig(data_parallel=2, num_microbatches=8), 4)
    assert not left_to_search(PipelineConfig(split_points=["2"]), 4)
    assert not left_to_search(PipelineConfig(shard_batch=False), 4)
