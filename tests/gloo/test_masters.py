"""bf16 parameters with fp32 master copies: any layout follows the same recipe written out by hand, and its checkpoints
lose nothing."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import autopipe
from scenarios.pipelines import make
from tests.gloo.launch import run_in_turn
from tests.gloo.plain import relative_error

ADAM = partial(torch.optim.AdamW, lr=1e-3, eps=1e-4, weight_decay=0.1)
TOLERANCE = 2e-4  # a sum in another order may round a parameter to the other of two bf16 neighbours
STEPS, BATCH, MICROBATCHES, MAX_NORM = 4, 12, 4, 0.5


def _by_hand(model: nn.Module, args: Any, target: Any, loss_fn: Any, num_steps: int) -> tuple[list[float], Any]:
    """The recipe: bf16 matrices under autocast, fp32 sums of gradients, AdamW on fp32 copies. Losses and copies by
    name."""
    norms = {p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    masters = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    for p in parameters.values():
        if p.dim() > 1 and p not in norms:
            p.data = p.data.bfloat16()
            p.grad_dtype = torch.float32  # the two uses of a tied weight are summed in fp32 too
    optimizer, losses = ADAM(masters.values()), []
    for _ in range(num_steps):
        total = 0.0
        for i in range(MICROBATCHES):
            rows = slice(3 * i, 3 * i + 3)
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_fn(model(args[0][rows]), target[rows]).float() / MICROBATCHES
            loss.backward()
            total += float(loss.detach())
        for n, m in masters.items():
            m.grad, parameters[n].grad = parameters[n].grad, None
        torch.nn.utils.clip_grad_norm_(masters.values(), MAX_NORM)
        optimizer.step()
        for n, p in parameters.items():
            p.data.copy_(masters[n])
        losses.append(total)
    return losses, {n: m.detach() for n, m in masters.items()}


def _engine(data_parallel: int, zero_stage: int, precision: str = "bf16-params") -> tuple[Any, Any, Any, Any, Any]:
    model, args, _, target, loss_fn = make("gpt", BATCH)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(
        model,
        args,
        example_target=target,
        loss_fn=loss_fn,
        optimizer=ADAM,
        num_microbatches=MICROBATCHES // data_parallel,
        data_parallel=data_parallel,
        zero_stage=zero_stage,
        precision=precision,
        max_grad_norm=MAX_NORM,
        schedule="zb-h1" if precision == "bf16-params" and data_parallel == 1 else "1f1b",
    )
    return engine, plain, args, target, loss_fn


def _train(data_parallel: int, zero_stage: int, directory: str | None) -> dict[str, Any]:
    engine, plain, args, target, loss_fn = _engine(data_parallel, zero_stage)
    losses = [float(engine.train_batch(*args, target=target)) for _ in range(STEPS)]
    expected, masters = _by_hand(plain, args, target, loss_fn, STEPS)
    ids, labels = args[0][:5, :7], target[:5, :7]  # another length, captured while gradients are there
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        evaluated = abs(float(engine.eval_batch(ids, target=labels)) / float(loss_fn(plain.eval()(ids), labels)) - 1)
    dtypes = {(n, p.dtype, p.grad.dtype) for n, p in engine.named_parameters() if p.grad is not None}
    state = engine.state_dict()
    held = sum(p.numel() for g in engine.optimizer.param_groups for p in g["params"])
    if directory is not None:
        engine.save_checkpoint(directory)
    later = [float(engine.train_batch(*args, target=target)) for _ in range(2)]
    engine.close()
    return {
        "evaluated": evaluated,
        "loss": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
        "state": max(relative_error(state[n], m) for n, m in masters.items()),
        "exact": {n: t.numpy() for n, t in state.items()},
        "dtypes": dtypes,
        "held": held,
        "later": later,
    }


def _resume(directory: str, data_parallel: int, zero_stage: int, precision: str) -> Any:
    engine, _, args, target, _ = _engine(data_parallel, zero_stage, precision)
    engine.load_checkpoint(directory)
    state = {n: t.numpy() for n, t in engine.state_dict().items()}
    later = [float(engine.train_batch(*args, target=target)) for _ in range(2)]
    engine.close()
    return state, later


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("masters"))


@pytest.fixture(scope="module")
def two_by_two(directory: str) -> list[dict[str, Any]]:
    """Two replicas of two stages with ZeRO-1; it leaves a checkpoint."""
    return run_in_turn(4, [(_train, (2, 1, directory))])[0]


@pytest.fixture(scope="module")
def two(directory: str, two_by_two: Any) -> list[list[Any]]:
    """Two stages: trained from the beginning, and resumed in two precisions from the checkpoint of the others."""
    resumed = [(_resume, (directory, 1, 0, precision)) for precision in ("bf16-params", "fp32")]
    return run_in_turn(2, [(_train, (1, 0, None)), *resumed])


def test_any_layout_follows_the_recipe_by_hand(two: list[list[Any]], two_by_two: list[dict[str, Any]]) -> None:
    for result in [*two[0], *two_by_two]:
        assert result["loss"] <= TOLERANCE
        assert result["state"] <= TOLERANCE
        assert result["evaluated"] <= TOLERANCE
        for name, dtype, gradient in result["dtypes"]:
            assert gradient == torch.float32
            assert dtype == (torch.float32 if "norm" in name or name.endswith("bias") else torch.bfloat16), name


def test_checkpoints_hold_the_copies_for_any_layout_and_precision(
    two: list[list[Any]], two_by_two: list[dict[str, Any]]
) -> None:
    saved = two_by_two[0]
    for resumed, tolerance in zip(two[1:], (1e-3, 2e-2), strict=True):
        for state, later in resumed:
            assert all((state[n] == value).all() for n, value in saved["exact"].items())
            assert later == pytest.approx(saved["later"], rel=tolerance)
