"""Faults that were seen in torch's and DeepSpeed's pipelines, and are not in this one.

The table in `docs/comparison.md` names these tests and those elsewhere.
"""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autopipe
from scenarios.pipelines import TiedGPT, make
from tests.gloo.launch import run_ranks
from tests.gloo.plain import plain_step, relative_error

SGD = partial(torch.optim.SGD, lr=0.1)


class Counted(torch.autograd.Function):
    """Counts its forwards on this rank."""

    forwards = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Counted.forwards += 1
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Checkpointed(nn.Module):
    """Reentrant checkpoints whose first input is an integer, or needs no gradient; with lists, dicts and None between
    layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(10, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def block(self, ids: Tensor, state: dict[str, Any], layer: nn.Module) -> dict[str, Any]:
        def body(ids: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(layer(Counted.apply(x))) + ids[..., None] * 0.1

        x = checkpoint(body, ids, state["x"], use_reentrant=True)
        return {"x": x, "seen": [*state["seen"], x], "nothing": None}

    def forward(self, ids: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"x": self.embed(ids), "seen": [], "nothing": None}
        for layer in self.layers:
            state = self.block(ids, state, layer)
        return {"y": state["x"] + state["seen"][0], "all": state["seen"], "nothing": state["nothing"]}


def _errors(engine: Any, plain: nn.Module) -> float:
    """The largest error on this rank; none where the cut, which follows what was measured, leaves it no parameters."""
    expected = {n: p.grad for n, p in plain.named_parameters()}
    errors = [relative_error(p.grad, expected[n]) for n, p in engine.named_parameters() if p.grad is not None]
    return max(errors, default=0.0)


def clipping() -> dict[str, Any]:
    """Most of the norm lies on the first stage, none of it may be missed on the second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    plain, x, target = copy.deepcopy(model), torch.randn(8, 4), 9 * torch.randn(8, 4)
    engine = autopipe.pipeline(
        model, loss_fn=F.mse_loss, optimizer=SGD, max_grad_norm=0.1, split_points=["2"], num_microbatches=2
    )
    engine.train_batch(x, target=target)
    F.mse_loss(plain(x), target).backward()
    norm = float(nn.utils.clip_grad_norm_(plain.parameters(), 0.1))
    parts = [
        float(nn.utils.get_total_norm([p.grad for p in plain[i].parameters() if p.grad is not None])) for i in (0, 2)
    ]
    return {"norm": engine.grad_norm / norm, "parts": parts, "gradients": _errors(engine, plain)}


def statistics() -> dict[str, Any]:
    """Planning and evaluation leave batch norm's statistics alone, and evaluation uses them."""
    model, args, _, target, loss_fn = make("resnet", 6)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(model, args, example_target=target, loss_fn=loss_fn, data_parallel=1, num_microbatches=2)
    untouched = all(torch.equal(b, engine.state_dict()[n]) for n, b in plain.named_buffers())
    engine.train_batch(*args, target=target)
    plain_step(plain, args, {}, target, loss_fn, 2)
    before = engine.state_dict()
    loss = float(engine.eval_batch(*args, target=target))
    unmoved = all(torch.equal(before[n], t) for n, t in engine.state_dict().items())
    with torch.no_grad():
        expected = float(loss_fn(plain.eval()(*args), target))
    return {"untouched": untouched, "unmoved": unmoved, "loss": loss / expected}


def checkpointing() -> dict[str, Any]:
    """Regions are computed again in the backward; their inputs may be integers; structures pass between layers and
    out."""
    torch.manual_seed(0)
    model = Checkpointed()
    plain, ids, target = copy.deepcopy(model), torch.randint(0, 10, (4, 3)), torch.randn(4, 3, 8)

    def loss_fn(output: dict[str, Any], target: Tensor) -> Tensor:
        return F.mse_loss(output["y"], target)

    engine = autopipe.pipeline(
        model, (ids,), example_target=target, loss_fn=loss_fn, data_parallel=1, num_microbatches=2
    )
    engine.train_batch(ids, target=target)
    Counted.forwards = 0
    engine.train_batch(ids, target=target)
    forwards = torch.tensor(Counted.forwards)
    dist.all_reduce(forwards)
    for _ in range(2):
        loss_fn(plain(ids), target).backward()
    output, expected = engine.predict(ids), plain(ids)
    return {
        "forwards": int(forwards),
        "gradients": _errors(engine, plain),
        "keys": list(output),
        "nothing": output["nothing"],
        "all": [relative_error(a, b.detach()) for a, b in zip(output["all"], expected["all"], strict=True)],
    }


def bf16() -> dict[str, Any]:
    """The loss is fp32, and differs where bf16 could not tell; the logits are those of all micro-batches."""
    model, args, _, target, loss_fn = make("gpt", 6)
    engine = autopipe.pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=partial(torch.optim.SGD, lr=1e-4),
        precision="bf16",
        data_parallel=1,
        num_microbatches=3,
    )
    losses = [engine.train_batch(*args, target=target) for _ in range(3)]
    return {
        "dtypes": {loss.dtype for loss in losses},
        "losses": len({float(loss) for loss in losses}),
        "rounded": len({float(loss.bfloat16()) for loss in losses}),
        "rows": engine.predict(*args).shape[0],
    }


def padding() -> dict[str, Any]:
    """The labels of all rows but the first are nearly all padding: the whole batch's token mean, and not the mean of
    means."""
    torch.manual_seed(0)
    model = TiedGPT()
    ids, labels = torch.randint(0, 50, (5, 12)), torch.randint(0, 50, (5, 12))
    labels[1:, 1:] = -100

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-100)

    results = {}
    for name, weight in (("weighted", lambda target: (target != -100).sum()), ("by samples", None)):
        mine, plain = copy.deepcopy(model), copy.deepcopy(model)
        engine = autopipe.pipeline(mine, loss_fn=loss_fn, data_parallel=1, num_microbatches=4, loss_weight=weight)
        loss = float(engine.train_batch(ids, target=labels))
        expected = loss_fn(plain(ids), labels)
        expected.backward()
        results[name] = (abs(loss / expected.item() - 1), _errors(engine, plain))
    return results


def other_calls() -> str:
    """One rank is at the end of its data and evaluates, the other trains on."""
    model, args, _, target, loss_fn = make("gpt", 4)
    engine = autopipe.pipeline(model, args, example_target=target, loss_fn=loss_fn)
    engine.train_batch(*args, target=target)
    try:
        call = engine.eval_batch if os.environ["RANK"] == "1" else engine.train_batch
        call(*args, target=target)
    except autopipe.EngineError as error:
        return str(error)
    return "nothing"


def _all() -> dict[str, Any]:
    dist.init_process_group("gloo")
    cases = (clipping, statistics, checkpointing, bf16, padding, other_calls)
    return {case.__name__: case() for case in cases}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(_all, 2)


def test_the_clipping_norm_is_that_of_all_stages(ranks: list[dict[str, Any]]) -> None:
    for result in (r["clipping"] for r in ranks):
        assert result["norm"] == pytest.approx(1.0, rel=1e-6)
        assert min(result["parts"]) > 0.1 * max(result["parts"])
        assert result["gradients"] <= 1e-5


def test_batch_norm_statistics_are_not_touched_by_planning_or_evaluation(ranks: list[dict[str, Any]]) -> None:
    for result in (r["statistics"] for r in ranks):
        assert result["untouched"]
        assert result["unmoved"]
        assert result["loss"] == pytest.approx(1.0, rel=1e-5)


def test_reentrant_checkpoints_over_integers_are_kept(ranks: list[dict[str, Any]]) -> None:
    for result in (r["checkpointing"] for r in ranks):
        # once and again for each of 2 micro-batches and 3 regions; what a stage has of a region without needing it
        # stays once
        assert 2 * (2 * 3 - 1) <= result["forwards"] <= 2 * 2 * 3
        assert result["gradients"] <= 1e-5


def test_dicts_lists_and_none_pass_between_layers_and_out(ranks: list[dict[str, Any]]) -> None:
    for result in (r["checkpointing"] for r in ranks):
        assert result["keys"] == ["y", "all", "nothing"]
        assert result["nothing"] is None
        assert len(result["all"]) == 3
        assert max(result["all"]) <= 1e-5


def test_a_bf16_loss_is_fp32_and_logits_are_all(ranks: list[dict[str, Any]]) -> None:
    for result in (r["bf16"] for r in ranks):
        assert result["dtypes"] == {torch.float32}
        assert result["losses"] == 3
        assert result["rounded"] == 1
        assert result["rows"] == 6


def test_a_batch_of_uneven_padding_gives_the_whole_batchs_gradient(ranks: list[dict[str, Any]]) -> None:
    for result in (r["padding"] for r in ranks):
        loss, gradient = result["weighted"]
        assert loss <= 1e-6
        assert gradient <= 1e-5
    assert max(r["padding"]["by samples"][1] for r in ranks) > 0.1


def test_training_on_one_rank_and_evaluation_on_the_other_is_an_error(ranks: list[dict[str, Any]]) -> None:
    for message in (r["other_calls"] for r in ranks):
        assert "rank 0 calls ('train'" in message
        assert "rank 1 calls ('eval'" in message
        assert "remedy" in message
