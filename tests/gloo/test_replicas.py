"""Replicas of the pipeline, ZeRO-1, several stages a rank, dropout, and fp16: what a run gives does not depend on how
it is laid out."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scenarios.pipelines import TiedGPT, make, token_loss
from tests.gloo.launch import run_ranks
from tests.gloo.plain import plain_step, relative_error

BATCH = 12


def _two_by_two(name: str, zero_stage: int, num_steps: int, batch: int) -> dict[str, Any]:
    """Two replicas of two stages beside the plain model on the whole batch: AdamW, clipping on."""
    import autopipe

    model, args, kwargs, target, loss_fn = make(name, batch)
    plain = copy.deepcopy(model)
    adam = partial(torch.optim.AdamW, lr=1e-3, eps=1e-4)
    engine = autopipe.pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=adam,
        num_stages=2,
        num_microbatches=2,
        zero_stage=zero_stage,
        max_grad_norm=0.5,
    )
    optimizer, loss_error, norm_error = adam(plain.parameters()), 0.0, 0.0
    for _ in range(num_steps):
        loss = engine.train_batch(*args, target=target, **kwargs)
        optimizer.zero_grad()
        expected = plain_step(plain, args, kwargs, target, loss_fn, 4)
        norm = float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
        norm_error = max(norm_error, abs(engine.grad_norm / norm - 1))
        optimizer.step()
        loss_error = max(loss_error, abs(float(loss) - expected) / abs(expected))
    state = engine.state_dict()
    trained = {n: relative_error(state[n], p) for n, p in plain.named_parameters()}
    held = 0 if engine.optimizer is None else sum(p.numel() for g in engine.optimizer.param_groups for p in g["params"])
    total = sum(p.numel() for p in engine.parameters() if p.requires_grad)
    output = engine.predict(*args, **kwargs)
    rows = (output if isinstance(output, Tensor) else output["logits"]).shape[0]
    engine.close()
    return {
        "loss": loss_error,
        "norm": norm_error,
        "parameters": max(trained.values()),
        "held": held,
        "total": total,
        "rows": rows,
    }


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("name", ["gpt", "frozen", "encoder_decoder"])
def test_two_replicas_of_two_stages_equal_the_plain_model_on_the_whole_batch(name: str, zero_stage: int) -> None:
    results = run_ranks(_two_by_two, 4, name, zero_stage, 10, BATCH)
    for result in results:
        assert result["loss"] <= 1e-5
        assert result["norm"] <= 1e-5
        assert result["parameters"] <= 1e-5
        assert result["rows"] == BATCH
    for first, second in zip(results[:2], results[2:], strict=True):
        assert first["held"] + second["held"] == first["total"] * (1 if zero_stage else 2)


def test_a_batch_smaller_than_the_replicas_want() -> None:
    for batch in (3, 1):
        for result in run_ranks(_two_by_two, 4, "gpt", 1, 3, batch):
            assert result["loss"] <= 1e-5
            assert result["parameters"] <= 1e-5


def _own_shares() -> float:
    import autopipe

    model, args, _, target, loss_fn = make("gpt", BATCH)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(model, loss_fn=loss_fn, data_parallel=2, num_microbatches=2, shard_batch=False)
    sampler = engine.sampler(range(BATCH), shuffle=False)  # type: ignore[arg-type]
    rows = list(sampler)[: 6 if sampler.rank == 0 else 4]
    engine.train_batch(args[0][rows], target=target[rows])
    kept = [r for r in range(BATCH) if r not in (9, 11)]
    loss_fn(plain(args[0][kept]), target[kept]).backward()
    expected = {n: p.grad for n, p in plain.named_parameters()}
    error = max(relative_error(p.grad, expected[n]) for n, p in engine.named_parameters() if n != "norm.bias")
    engine.close()
    return error


def test_each_replica_may_read_a_share_of_its_own() -> None:
    for error in run_ranks(_own_shares, 2):
        assert error <= 2e-5


class Dropped(TiedGPT):
    """Dropout in leaves, in a function, and inside a checkpoint region."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.wte(ids))
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(
                lambda y, b=block: F.dropout(b(y), 0.2, self.training), x, use_reentrant=False
            )
        return self.head(self.norm(x))


def _dropout_curve(num_steps: int, data_parallel: int) -> list[float]:
    import autopipe

    torch.manual_seed(1)
    model = Dropped()
    ids, target = torch.randint(0, 50, (BATCH, 12)), torch.randint(0, 50, (BATCH, 12))
    engine = autopipe.pipeline(
        model,
        loss_fn=token_loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        num_microbatches=4 // data_parallel,
        data_parallel=data_parallel,
        seed=7,
    )
    losses = [float(engine.train_batch(ids, target=target)) for _ in range(num_steps)]
    engine.close()
    return losses


def test_dropout_does_not_depend_on_stages_and_replicas() -> None:
    reference = run_ranks(_dropout_curve, 1, 20, 1)[0]
    assert len(set(reference)) == 20
    for num_ranks, replicas in ((2, 1), (3, 1), (4, 1), (4, 2)):
        for losses in run_ranks(_dropout_curve, num_ranks, 20, replicas):
            assert losses == pytest.approx(reference, rel=1e-5)


def _several_stages_a_rank(name: str) -> float:
    import autopipe

    model, args, kwargs, target, loss_fn = make(name, BATCH)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(model, loss_fn=loss_fn, num_stages=4, data_parallel=1, num_microbatches=6)
    engine.train_batch(*args, target=target, **kwargs)
    assert engine.plan.schedule == "interleaved"
    plain_step(plain, args, kwargs, target, loss_fn, 6)
    expected = {n: p.grad for n, p in plain.named_parameters()}
    errors = [relative_error(p.grad, expected[n]) for n, p in engine.named_parameters() if p.grad is not None]
    engine.eval_batch(*args, target=target, **kwargs)
    engine.close()
    return max(errors, default=0.0)


@pytest.mark.parametrize("name", ["gpt", "resnet", "unet", "encoder_decoder"])
def test_interleaved_stages_give_the_plain_gradients(name: str) -> None:
    for error in run_ranks(_several_stages_a_rank, 2, name):
        assert error <= 1e-6


class Plant(torch.autograd.Function):
    """Multiplies by a weight, whose gradient is infinite where the gain is large; the input's stays finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, gain)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, gain = ctx.saved_tensors
        return grad * weight, torch.where(gain > 1, torch.inf, (grad * x).sum(0)), None


class Overflows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return Plant.apply(x, self.weight, self.gain)


def _planted_overflow() -> dict[str, Any]:
    import autopipe

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Overflows(), nn.Linear(4, 4))
    engine = autopipe.pipeline(
        model,
        loss_fn=F.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        precision="fp16",
        num_microbatches=2,
        split_points=["2"],
    )
    x, target = torch.randn(8, 4), torch.randn(8, 4)
    states, losses = [], []
    for step in range(4):
        with torch.no_grad():
            model[2].gain.fill_(2.0 if step == 2 else 1.0)
        losses.append(float(engine.train_batch(x, target=target)))
        states.append({n: p.detach().clone() for n, p in engine.named_parameters() if n != "2.gain"})
    unchanged = all(torch.equal(states[1][n], states[2][n]) for n in states[1])
    moved = all(not torch.equal(states[2][n], states[3][n]) for n in states[2])
    skipped = engine.skipped_steps
    engine.close()
    return {"unchanged": unchanged, "moved": moved, "skipped": skipped, "losses": losses}


def test_an_fp16_overflow_on_one_stage_skips_the_step_on_all() -> None:
    for result in run_ranks(_planted_overflow, 2):
        assert result["unchanged"]
        assert result["moved"]
        assert result["skipped"] == 1


def _order_of_a_set() -> list[str]:
    return list({"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "in_proj_weight"})


def test_ranks_of_these_tests_hash_strings_differently() -> None:
    first, second, third = run_ranks(_order_of_a_set, 3)
    assert first != second and first == third
