"""Each rank makes or reads its own stage alone: models on the meta device, pretrained weights, and what a rank keeps of
a real model."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autopipe
from scenarios.pipelines import make
from tests.gloo.durability import ran
from tests.gloo.launch import run_ranks

SGD = partial(torch.optim.SGD, lr=0.1)


def _engine(on_meta: bool, **options: Any) -> tuple[Any, Any, Any]:
    model, args, _, target, loss_fn = make("gpt", 8)
    if on_meta:
        with torch.device("meta"):
            model = type(model)()
    engine = autopipe.pipeline(
        model,
        args,
        example_target=target,
        loss_fn=loss_fn,
        optimizer=SGD,
        num_microbatches=4,
        seed=5,
        data_parallel=1,
        **options,
    )
    return engine, args, target


def _train(on_meta: bool, options: dict[str, Any]) -> tuple[dict[str, Any], list[float], list[str]]:
    engine, args, target = _engine(on_meta, **options)
    state = {n: t.numpy().copy() for n, t in engine.state_dict().items()}
    losses = [float(engine.train_batch(*args, target=target)) for _ in range(2)]
    with_data = [n for n, p in engine._state.programs.model.module.named_parameters() if p.device.type != "meta"]
    assert sorted(with_data) == sorted(n for n, _ in engine.named_parameters())
    engine.eval_batch(*args, target=target)  # another graph of a model whose other parameters are gone
    engine.predict(*args)
    engine.close()
    return state, losses, with_data


@pytest.mark.parametrize("source", ["safetensors", "torch"])
def test_a_model_on_meta_starts_from_pretrained_weights(source: str, tmp_path: Path) -> None:
    from safetensors.torch import save_model

    plain = make("gpt", 8)[0]
    whole, losses, _ = run_ranks(_train, 1, False, {})[0]
    if source == "safetensors":  # which leaves tied names out
        save_model(plain, str(tmp_path / "model.safetensors"))
        weights = str(tmp_path)
    else:
        torch.save(plain.state_dict(), tmp_path / "model.pt")
        weights = str(tmp_path / "model.pt")
    for on_meta in (True, False) if source == "torch" else (True,):
        options = {"weights": weights, "split_points": ["blocks.1", "blocks.3"]}
        for state, later, held in run_ranks(_train, 3, on_meta, options):
            assert all((state[n] == t).all() for n, t in whole.items())
            assert later == pytest.approx(losses, rel=1e-5)
            assert 0 < len(held) < len(whole)


def test_the_initialisation_does_not_depend_on_the_number_of_stages() -> None:
    whole, losses, _ = run_ranks(_train, 1, True, {})[0]
    for state, later, _ in run_ranks(_train, 3, True, {}):
        assert all((state[n] == t).all() for n, t in whole.items())
        assert later == pytest.approx(losses, rel=1e-5)


def _kept() -> tuple[bool, str]:
    model, args, _, target, loss_fn = make("gpt", 8)
    references = {n: weakref.ref(p) for n, p in model.named_parameters()}
    start = partial(autopipe.pipeline, model, args, example_target=target, loss_fn=loss_fn, optimizer=SGD)
    engine = start(split_points=["blocks.3"])
    engine.train_batch(*args, target=target)
    gc.collect()
    held = {n for n, _ in engine.named_parameters()}
    gone = all((references[n]() is None) == (n not in held) for n in references)
    try:
        start(split_points=["blocks.1"])
    except autopipe.AutopipeError as error:
        return gone, str(error)
    return gone, ""


def test_a_rank_lets_go_of_the_parameters_of_other_ranks() -> None:
    for gone, told in run_ranks(_kept, 2):
        assert gone
        assert "earlier engine" in told
        assert "weights=" in told


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    start = partial(autopipe.pipeline, example_args=(x,), example_target=x, loss_fn=F.mse_loss)
    torch.save({"weight": torch.ones(4, 4)}, tmp_path / "a.pt")
    with pytest.raises(autopipe.CheckpointError, match=r"no tensor 'bias'.*a\.pt"):
        start(model, weights=tmp_path / "a.pt")
    torch.save({"weight": torch.ones(5, 4), "bias": torch.ones(4)}, tmp_path / "b.pt")
    for linear in (model, nn.Linear(4, 4)):
        with pytest.raises(autopipe.CheckpointError, match=r"shape \(5, 4\)"):
            start(linear, weights=tmp_path / "b.pt")
    with pytest.raises(autopipe.CheckpointError, match="no file"):
        start(model, weights=tmp_path / "c.pt")


def test_a_checkpoint_is_loaded_into_a_model_on_meta(tmp_path: Path) -> None:
    class Bare(nn.Module):  # nothing initialises it
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    x = torch.randn(2, 4)
    first = autopipe.pipeline(Bare(), (x,), example_target=x + 1, loss_fn=F.mse_loss, optimizer=SGD)
    first.train_batch(x, target=x + 1)
    first.save_checkpoint(tmp_path)
    with torch.device("meta"):
        model = Bare()
    engine = autopipe.pipeline(model, loss_fn=F.mse_loss, optimizer=SGD)
    engine.load_checkpoint(tmp_path)
    engine.prepare((x,), {}, x + 1)
    assert torch.equal(engine.state_dict()["scale"], first.state_dict()["scale"])
    with torch.device("meta"):
        model = Bare()
    again = autopipe.pipeline(model, (x,), example_target=x, loss_fn=F.mse_loss, weights=tmp_path)
    assert torch.equal(again.state_dict()["scale"], first.state_dict()["scale"])


def test_a_rank_holds_no_more_than_its_stage(tmp_path: Path) -> None:
    rows = ran(
        "memory",
        "--width",
        "512",
        "--layers",
        "4",
        "--ranks",
        "2",
        "--sources",
        "measuring",
        "reset_parameters",
        folder=tmp_path,
    )["rows"]
    found = [row for row in rows if row["source"] == "reset_parameters"]
    assert len(found) == 2
    for row in found:  # measuring takes memory of its own, a few layers at a time
        assert row["stage_bytes"] > 10e6
        assert row["ratio"] <= 1.3
