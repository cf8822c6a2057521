"""The iterator front end: ranks agree on the end of the data and on failures of iterators; what it computes is what
single calls compute."""

from __future__ import annotations

import copy
import os
from collections import UserDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import autopipe
from autopipe.engine.data_feed import batch_of
from scenarios.pipelines import make
from tests.gloo.launch import run_ranks
from tests.gloo.logs import kept_warnings

SGD = partial(torch.optim.SGD, lr=0.1)


def _batches(count: int, rows: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randint(0, 50, (rows, 12), generator=generator),
            torch.randint(0, 50, (rows, 12), generator=generator),
        )
        for _ in range(count)
    ]


def _failing(count: int) -> Iterator[Any]:
    yield from _batches(count)
    raise ValueError("no such file")


def _train_on_iterators() -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    model, _, _, _, loss_fn = make("gpt", 6)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=SGD,
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=3),
        data_parallel=1,
        num_microbatches=2,
    )
    warnings = kept_warnings()
    lines: list[str] = []
    losses = engine.train(_batches(5 if rank == 1 else 7), log_every=2, log=lines.append)

    optimizer = SGD(plain.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)
    expected = []
    for ids, target in _batches(5):
        optimizer.zero_grad()
        loss = loss_fn(plain(ids), target)
        loss.backward()
        optimizer.step()
        scheduler.step()
        expected.append(float(loss.detach()))
    evaluated = engine.evaluate(_batches(3) + ([] if rank == 1 else _batches(2)))
    with torch.no_grad():
        mean = sum(float(loss_fn(plain(ids), target)) for ids, target in _batches(3)) / 3
    try:
        engine.train(_failing(2) if rank == 1 else iter(_batches(4)))
        message = "nothing"
    except autopipe.EngineError as error:
        message = str(error)
    source = iter(_batches(4))
    after = engine.train(source, 2)
    left = len(list(source))
    engine.close()
    return {
        "losses": (losses, expected),
        "evaluated": (evaluated, mean),
        "lines": lines,
        "warnings": warnings,
        "message": message,
        "after": (len(after), left),
        "steps": engine.steps,
    }


def test_data_that_ends_or_fails_on_one_rank_ends_or_fails_on_all() -> None:
    results = run_ranks(_train_on_iterators, 2)
    for rank, result in enumerate(results):
        losses, expected = result["losses"]
        assert losses == pytest.approx(expected, rel=1e-5)
        evaluated, mean = result["evaluated"]
        assert evaluated == pytest.approx(mean, rel=1e-5)
        assert len(result["warnings"]) == 2
        assert ("has no more data after 5 batches" in result["warnings"][0]) == (rank == 1)
        assert "ValueError: no such file; expected a batch; at the data iterator of rank 1" in result["message"]
        assert result["after"] == (2, 2)
        assert result["steps"] == 5 + 2 + 2
    assert [line.partition(":")[0] for line in results[0]["lines"]] == ["step 2", "step 4"]
    for word in ("loss", "lr 0.01", "gradient norm", "samples/s", "peak", "bubble"):
        assert word in results[0]["lines"][1]
    assert results[1]["lines"] == []


def _own_shares_end_apart() -> tuple[list[float], float]:
    rank = int(os.environ["RANK"])
    model, _, _, _, loss_fn = make("gpt", 6)
    engine = autopipe.pipeline(
        model, loss_fn=loss_fn, optimizer=SGD, data_parallel=2, num_microbatches=2, shard_batch=False
    )
    losses = engine.train(_batches(3 if rank == 0 else 2))
    mean = engine.evaluate([(ids[:3], target[:3]) if rank == 0 else (ids, target) for ids, target in _batches(2)])
    engine.close()
    return losses, mean


def test_replicas_with_data_of_their_own_end_together() -> None:
    (losses, mean), (others, other_mean) = run_ranks(_own_shares_end_apart, 2)
    assert losses == others
    assert len(losses) == 2
    assert mean == other_mean


@pytest.mark.parametrize(
    ("item", "with_target", "args", "keys", "target"),
    [
        ((1, 2), True, (1,), [], 2),
        ((1, 2, 3), True, (1, 2), [], 3),
        ([1, 2], False, (1, 2), [], None),
        (5, False, (5,), [], None),
        ({"x": 1, "target": 2}, True, (), ["x"], 2),
        ({"x": 1, "labels": 2}, False, (), ["x", "labels"], None),
    ],
)
def test_what_an_iterator_may_yield(item: Any, with_target: bool, args: Any, keys: Any, target: Any) -> None:
    call = batch_of(item, with_target=with_target)
    assert (call.args, list(call.kwargs), call.target) == (args, keys, target)


def test_tensors_in_any_mapping_are_moved() -> None:
    item = UserDict(x=torch.ones(2), more=[torch.ones(1)], target=None)
    call = batch_of(item, with_target=True).to(torch.device("meta"))
    assert call.kwargs["x"].is_meta
    assert call.kwargs["more"][0].is_meta


@pytest.mark.parametrize("item", [5, (5,), {"x": 1}])
def test_a_batch_without_a_target_is_named(item: Any) -> None:
    with pytest.raises(autopipe.ConfigError, match=r"without a target.*remedy"):
        batch_of(item, with_target=True)


def test_an_evaluation_over_nothing_is_named() -> None:
    model, _, _, _, loss_fn = make("gpt", 6)
    with pytest.raises(autopipe.ConfigError, match="no batch"):
        autopipe.pipeline(model, loss_fn=loss_fn).evaluate([])
