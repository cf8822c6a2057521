"""A plan that names the ranks of its stages and replicas: the engine lays the pipeline on them in this order."""

from __future__ import annotations

import copy
import dataclasses
import functools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scenarios.pipelines import make
from tests.gloo.launch import run_in_turn, run_ranks
from tests.gloo.plain import plain_step, relative_error

BATCH = 12
REPLICAS_TOGETHER = (0, 2, 1, 3)
"""Ranks 0 and 1 run the first stage: replica 0 is on ranks 0 and 2."""
MIXED = (3, 1, 0, 2)
"""Replica 0 is on ranks 3 and 1, so that the replicas of a stage are not in ascending order."""


@functools.cache
def _plan() -> Any:
    """Two replicas of two stages, planned without devices."""
    import autopipe
    import profiler

    model, args, _, target, loss_fn = make("gpt", BATCH // 4)
    captured = autopipe.capture(model, args, loss_fn=loss_fn, target=target).loss_only()
    measured = profiler.estimate(
        captured.graph_module,
        [*args, target],
        device="h100",
        names=captured.names,
        graph_hash=captured.graph_hash,
    )
    return autopipe.partition(measured, num_stages=2, num_microbatches=2, data_parallel=2)


def _engine(ranks: tuple[int, ...], zero_stage: int, plan: Any) -> tuple[Any, Any, Any, Any, Any]:
    import autopipe

    model, args, _, target, loss_fn = make("gpt", BATCH)
    plain = copy.deepcopy(model)
    placed = dataclasses.replace(plan, ranks=ranks, zero_stage=zero_stage)
    adam = partial(torch.optim.AdamW, lr=1e-3, eps=1e-4)
    engine = autopipe.pipeline(model, loss_fn=loss_fn, optimizer=adam, plan=placed, max_grad_norm=0.5)
    return engine, plain, args, target, loss_fn


def _train(ranks: tuple[int, ...], zero_stage: int, plan: Any, directory: str) -> dict[str, Any]:
    """Three steps beside the plain model; a checkpoint after the second, and the loss of the third."""
    engine, plain, args, target, loss_fn = _engine(ranks, zero_stage, plan)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, eps=1e-4)
    gradient_error = loss = 0.0
    for step in range(3):
        loss = float(engine.train_batch(*args, target=target))
        optimizer.zero_grad()
        plain_step(plain, args, {}, target, loss_fn, 4)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        wanted = {n: p.grad for n, p in plain.named_parameters()}
        errors = [relative_error(p.grad, wanted[n]) for n, p in engine.named_parameters() if p.grad is not None]
        gradient_error = max(gradient_error, *errors)
        optimizer.step()
        if step == 1:
            engine.save_checkpoint(directory)
    state = engine.state_dict()
    output: Tensor = engine.predict(*args)
    with torch.no_grad():
        output_error = relative_error(output, plain.eval()(*args))
    engine.report()
    held = 0 if engine.optimizer is None else sum(p.numel() for g in engine.optimizer.param_groups for p in g["params"])
    result = {
        "gradients": gradient_error,
        "parameters": max(relative_error(state[n], p) for n, p in plain.named_parameters()),
        "output": output_error,
        "loss": loss,
        "stage": engine.stage,
        "replica": engine.sampler(range(BATCH)).rank,
        "held": held,
        "total": sum(p.numel() for p in engine.parameters()),
    }
    engine.close()
    return result


def _resume(ranks: tuple[int, ...], zero_stage: int, plan: Any, directory: str) -> float:
    engine, _, args, target, _ = _engine(ranks, zero_stage, plan)
    engine.load_checkpoint(directory)
    loss = float(engine.train_batch(*args, target=target))
    engine.close()
    return loss


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Two orders, without and with ZeRO-1, and the checkpoint of each read under another."""
    plan, folder = _plan(), tmp_path_factory.mktemp("placed")
    trained = [(REPLICAS_TOGETHER, 0), (MIXED, 1)]
    resumed = [(MIXED, 1), ((), 0)]
    calls: list[Any] = [(_train, (*way, plan, str(folder / str(i)))) for i, way in enumerate(trained)]
    calls += [(_resume, (*way, plan, str(folder / str(i)))) for i, way in enumerate(resumed)]
    results = run_in_turn(4, calls)
    return {"trained": results[:2], "resumed": results[2:]}


def test_gradients_are_the_plain_models_in_every_order(placed: dict[str, list[Any]]) -> None:
    for ranks in placed["trained"]:
        for result in ranks:
            assert result["gradients"] <= 1e-5
            assert result["parameters"] <= 1e-5
            assert result["output"] <= 1e-5


def test_the_ranks_run_what_the_plan_says(placed: dict[str, list[Any]]) -> None:
    together, mixed = ([(r["replica"], r["stage"]) for r in ranks] for ranks in placed["trained"])
    assert together == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert mixed == [(1, 0), (0, 1), (1, 1), (0, 0)]


def test_the_plan_says_whether_the_optimizer_is_sharded(placed: dict[str, list[Any]]) -> None:
    for zero_stage, ranks in zip((0, 1), placed["trained"], strict=True):
        for stage in (0, 1):
            replicas = [r for r in ranks if r["stage"] == stage]
            assert sum(r["held"] for r in replicas) == replicas[0]["total"] * (1 if zero_stage else 2)


def test_a_checkpoint_of_one_order_is_read_under_another(placed: dict[str, list[Any]]) -> None:
    for before, after in zip(placed["trained"], placed["resumed"], strict=True):
        assert after == pytest.approx([r["loss"] for r in before], rel=1e-5)


def _refused(plan: Any) -> list[str]:
    import autopipe

    model, args, _, target, loss_fn = make("gpt", BATCH)
    said = []
    for wrong, settings in (
        (dataclasses.replace(plan, ranks=REPLICAS_TOGETHER), {}),
        (dataclasses.replace(plan, ranks=(), data_parallel=1), {"data_parallel": 2}),
        (dataclasses.replace(plan, ranks=(), data_parallel=1), {"num_stages": 1}),
        (dataclasses.replace(plan, ranks=(), zero_stage=1), {}),
    ):
        with pytest.raises(autopipe.PlanError) as error:
            autopipe.pipeline(model, args, example_target=target, loss_fn=loss_fn, plan=wrong, **settings)
        said.append(str(error.value))
    return said


def test_a_plan_for_other_processes_is_refused_with_the_remedy() -> None:
    for said in run_ranks(_refused, 2, _plan()):
        assert "2 processes for a plan of 2 stages, 2 replicas" in said[0]
        assert "--nproc-per-node 4" in said[0]
        assert "data_parallel = 2 beside a plan of 1" in said[1]
        assert "num_stages = 1 beside a plan of 2" in said[2]
        assert "ZeRO-1 without an optimizer" in said[3]


def test_one_process_does_not_run_a_plan_of_two(tmp_path: Path) -> None:
    import autopipe

    path = tmp_path / "plan.json"
    _plan().save(path)
    model, _, _, _, loss_fn = make("gpt", BATCH)
    with pytest.raises(autopipe.PlanError, match=r"1 process for a plan.*--nproc-per-node 4"):
        autopipe.pipeline(model, loss_fn=loss_fn, plan=path)
