"""What is trained, and how: parameter groups by name, adapters over a frozen base, stages without trainable or any
parameters, thawing."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopipe
from scenarios.pipelines import TiedGPT, token_loss
from tests.gloo.launch import run_in_turn
from tests.gloo.plain import plain_step, relative_error

STEPS, ROWS, MICROBATCHES = 3, 8, 4


class Adapted(nn.Module):
    """A frozen linear layer, and beside it a trained product of two thin matrices (LoRA; Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Parameterless(nn.Module):
    """The first stage has no parameters, the second none that are trained; a float without gradient passes through
    both."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.frozen, self.last = nn.Softsign(), nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.scale(x) * 2
        weight = mask * 0.5
        return self.last(torch.tanh(self.frozen(x))) * weight


def decayed(named_parameters: Any) -> torch.optim.Optimizer:
    """Weight decay for matrices alone, a rate of their own for embeddings: by name, the same groups on every stage."""
    groups: dict[str, list[Any]] = {"wte|wpe": [], "weight": [], "other": []}
    for name, parameter in named_parameters:
        kind = next((k for k in ("wte|wpe", "weight") if any(part in name for part in k.split("|"))), "other")
        groups[kind].append(parameter)
    options = [{"lr": 3e-3}, {"weight_decay": 0.3}, {}]
    return torch.optim.AdamW(
        [{"params": g, **o} for g, o in zip(groups.values(), options, strict=True)], lr=1e-3, eps=1e-4, weight_decay=0.0
    )


def _case(name: str) -> tuple[nn.Module, tuple[Tensor, ...], Tensor, Any, Any, list[str] | None]:
    """Model, arguments, target, loss function, optimizer, cuts."""
    torch.manual_seed(1)
    adam = partial(torch.optim.AdamW, lr=1e-2, eps=1e-4)
    if name in ("groups", "adapters"):
        model: Any = TiedGPT()
        if name == "adapters":
            model.requires_grad_(False)
            for block in model.blocks:
                block.qkv = Adapted(block.qkv)
        ids, target = torch.randint(0, 50, (ROWS, 12)), torch.randint(0, 50, (ROWS, 12))
        return model, (ids,), target, token_loss, decayed if name == "groups" else adam, ["blocks.2"]
    if name == "frozen first stage":
        layers = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Tanh(), nn.Linear(6, 6))
        return layers, (torch.randn(ROWS, 6),), torch.randn(ROWS, 6), F.mse_loss, adam, ["2"]
    model = Parameterless()
    return (
        model,
        (torch.randn(ROWS, 6), torch.ones(ROWS, 6)),
        torch.randn(ROWS, 6),
        F.mse_loss,
        adam,
        ["frozen", "last"],
    )


def _train(name: str, data_parallel: int, zero_stage: int) -> dict[str, Any]:
    model, args, target, loss_fn, optimizer, cuts = _case(name)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=optimizer,
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5),
        num_microbatches=MICROBATCHES // data_parallel,
        data_parallel=data_parallel,
        zero_stage=zero_stage,
        max_grad_norm=1.0,
        split_points=cuts,
    )
    named = [(n, p) for n, p in plain.named_parameters() if p.requires_grad]
    theirs = optimizer(named) if optimizer is decayed else optimizer([p for _, p in named])
    scheduler = torch.optim.lr_scheduler.StepLR(theirs, step_size=2, gamma=0.5)
    error = 0.0
    for _ in range(STEPS):
        loss = engine.train_batch(*args, target=target)
        theirs.zero_grad()
        expected = plain_step(plain, args, {}, target, loss_fn, MICROBATCHES)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        theirs.step()
        scheduler.step()
        error = max(error, abs(float(loss) - expected) / abs(expected))
    state = engine.state_dict()
    errors = {n: relative_error(state[n], p.detach()) for n, p in plain.named_parameters()}
    here = [n for n, p in engine.named_parameters() if p.requires_grad]
    groups = None if engine.optimizer is None else [len(g["params"]) for g in engine.optimizer.param_groups]
    engine.close()
    return {"loss": error, "parameters": errors, "trained here": here, "groups": groups}


def _thaw(zero_stage: int) -> float:
    """After two steps the base is thawed: its parameters join the optimizer, the moments of the others stay."""
    model, args, target, loss_fn, _, cuts = _case("adapters")
    plain = copy.deepcopy(model)
    adam = partial(torch.optim.AdamW, lr=1e-2, eps=1e-4)
    engine = autopipe.pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=adam,
        num_stages=2,
        num_microbatches=2 if zero_stage else 4,
        zero_stage=zero_stage,
        split_points=cuts,
    )
    theirs = adam(plain.parameters())
    for step in range(4):
        if step == 2:
            model.blocks[0].requires_grad_(True)
            plain.blocks[0].requires_grad_(True)
        engine.train_batch(*args, target=target)
        theirs.zero_grad()
        plain_step(plain, args, {}, target, loss_fn, MICROBATCHES)
        theirs.step()
    state = engine.state_dict()
    engine.close()
    return max(relative_error(state[n], p.detach()) for n, p in plain.named_parameters())


LAUNCHES: dict[str, tuple[int, dict[str, tuple[Any, tuple[Any, ...]]]]] = {
    "two": (
        2,
        {
            "groups": (_train, ("groups", 1, 0)),
            "adapters": (_train, ("adapters", 1, 0)),
            "frozen first stage": (_train, ("frozen first stage", 1, 0)),
            "thaw": (_thaw, (0,)),
        },
    ),
    "three": (3, {"parameterless": (_train, ("parameterless", 1, 0))}),
    "two by two, ZeRO-1": (4, {"groups": (_train, ("groups", 2, 1)), "thaw": (_thaw, (1,))}),
}


@pytest.fixture(scope="module", params=list(LAUNCHES))
def results(request: pytest.FixtureRequest) -> dict[str, list[Any]]:
    """For each case of a launch, what the ranks give."""
    ranks, calls = LAUNCHES[request.param]
    return dict(zip(calls, run_in_turn(ranks, list(calls.values())), strict=True))


def test_what_is_trained_follows_the_plain_run(results: dict[str, list[Any]]) -> None:
    for name in results.keys() - {"thaw"}:
        for result in results[name]:
            assert result["loss"] <= 1e-5, name
            assert max(result["parameters"].values()) <= 1e-5, (name, result["parameters"])
        if name == "groups":
            assert all(len(r["groups"]) == 3 for r in results[name])
        if name in ("frozen first stage", "parameterless"):
            before = len(results[name]) - 1
            assert [bool(r["trained here"]) for r in results[name]] == [False] * before + [True]
            assert [r["groups"] is None for r in results[name]] == [True] * before + [False]


def test_thawed_parameters_join_the_optimizer(results: dict[str, list[Any]]) -> None:
    for error in results.get("thaw", ()):
        assert error <= 1e-5


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda params: [torch.optim.SGD(params, lr=0.1)] * 2,
        [torch.optim.SGD, torch.optim.AdamW],
        torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1),
    ],
    ids=["a list returned", "a list", "one that is made"],
)
def test_several_or_finished_optimizers_are_refused_in_words(optimizer: Any) -> None:
    x = torch.randn(4, 4)
    with pytest.raises(autopipe.ConfigError, match=r"one (torch\.optim\.O|o)ptimizer.*parameter groups"):
        autopipe.pipeline(nn.Linear(4, 4), (x,), example_target=x, loss_fn=F.mse_loss, optimizer=optimizer)


def test_a_scheduler_that_steps_by_a_metric_is_refused_in_words() -> None:
    x = torch.randn(4, 4)
    with pytest.raises(autopipe.ConfigError, match="step it yourself"):
        autopipe.pipeline(
            nn.Linear(4, 4),
            (x,),
            example_target=x,
            loss_fn=F.mse_loss,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau,
        )
