"""Evaluation and prediction: as the first call, in turn with training, with growing lengths, on all ranks or the last;
nothing is kept."""

from __future__ import annotations

import copy
import gc
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopipe
import autopipe.engine.step.program_cache as program_cache
from scenarios.pipelines import TiedGPT, make
from tests.gloo.launch import run_in_turn
from tests.gloo.plain import plain_step, relative_error

SGD = partial(torch.optim.SGD, lr=0.1)


class NoBatch(nn.Module):
    """The second output has no row for each sample and differs between micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layers(x)
        return y, y.sum(0)[:3]


def _in_turn() -> dict[str, Any]:
    """Predicts first, then trains, evaluates and predicts in turn, beside the plain model."""
    model, args, _, target, loss_fn = make("gpt", 6)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(model, loss_fn=loss_fn, optimizer=SGD, data_parallel=1, num_microbatches=3)
    ours, theirs = engine.predict(*args), plain.eval()(*args)
    errors = [relative_error(ours, theirs)]
    optimizer = SGD(plain.parameters())
    for rows, length in ((6, 12), (5, 9), (2, 12)):
        ids, labels = args[0][:rows, :length], target[:rows, :length]
        loss = engine.train_batch(ids, target=labels)
        optimizer.zero_grad()
        errors.append(abs(float(loss) / plain_step(plain.train(), (ids,), {}, labels, loss_fn, 3) - 1))
        optimizer.step()
        with torch.no_grad():
            expected = plain.eval()(ids)
            errors.append(abs(float(engine.eval_batch(ids, target=labels) / loss_fn(expected, labels)) - 1))
            errors.append(relative_error(engine.predict(ids), expected))
    engine.close()
    return {"errors": errors}


def _num_tensors() -> int:
    """Tensors that stay: gloo's threads let go of what they have sent a moment after it has arrived."""
    counts = []
    for _ in range(4):
        gc.collect()
        counts.append(sum(isinstance(o, Tensor) for o in gc.get_objects()))
        time.sleep(0.01)
    return min(counts)


def _generate(predict_on: str) -> dict[str, Any]:
    """Greedy decoding without a loss anywhere; the cache of captured lengths holds three."""
    program_cache.MAX_PROGRAMS = 3
    torch.manual_seed(1)
    model = TiedGPT(layers=2)
    plain = copy.deepcopy(model).eval()
    engine = autopipe.pipeline(model, data_parallel=1, num_microbatches=2, predict_on=predict_on)
    ids = theirs = torch.randint(0, 50, (3, 4))
    nothing = []
    for _ in range(4):
        output = engine.predict(ids)
        with torch.no_grad():
            theirs = torch.cat([theirs, plain(theirs)[:, -1].argmax(-1, keepdim=True)], 1)
        nothing.append(output is None)
        ids = theirs if output is None else torch.cat([ids, output[:, -1].argmax(-1, keepdim=True)], 1)
    kept = len(engine._state.programs)
    for _ in range(2):
        engine.predict(ids)
    before = _num_tensors()
    for _ in range(3):
        engine.predict(ids)
    grown = _num_tensors() - before
    engine.close()
    return {"ids": ids.tolist(), "expected": theirs.tolist(), "nothing": set(nothing), "kept": kept, "grown": grown}


def _no_batch(predict_on: str) -> str:
    engine = autopipe.pipeline(
        NoBatch(), loss_fn=F.mse_loss, data_parallel=1, num_microbatches=2, predict_on=predict_on
    )
    try:
        engine.predict(torch.randn(4, 4))
    except autopipe.EngineError as error:
        return str(error)
    return "nothing"


def _replicas() -> tuple[float, list[int]]:
    model, args, kwargs, _, _ = make("encoder_decoder", 5)
    plain = copy.deepcopy(model).eval()
    engine = autopipe.pipeline(model, num_stages=2, num_microbatches=1)
    output = engine.predict(*args, **kwargs)
    engine.close()
    return relative_error(output["logits"], plain(*args, **kwargs)["logits"].detach()), list(output["logits"].shape)


def _accumulate(precision: str, data_parallel: int, directory: str) -> dict[str, Any]:
    model, args, _, target, loss_fn = make("gpt", 6)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=SGD,
        num_microbatches=2,
        data_parallel=data_parallel,
        precision=precision,
        max_grad_norm=0.5,
        accumulate_batches=2,
    )
    optimizer = SGD(plain.parameters())
    message = ""
    for batch in range(4):
        ids, labels = args[0][:, batch:], target[:, batch:]
        engine.train_batch(ids, target=labels)
        with torch.autocast("cpu", torch.float16, enabled=precision == "fp16"):
            loss = loss_fn(plain(ids), labels) / 2
        loss.backward()
        if batch % 2:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        elif not batch:
            try:
                engine.save_checkpoint(directory)
            except autopipe.EngineError as error:
                message = str(error)
    state = engine.state_dict()
    engine.close()
    return {"error": max(relative_error(state[n], p.detach()) for n, p in plain.named_parameters()), "message": message}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    directory = str(tmp_path_factory.mktemp("two"))
    calls = {
        "in turn": (_in_turn, ()),
        "generate all": (_generate, ("all",)),
        "generate last": (_generate, ("last",)),
        "no batch all": (_no_batch, ("all",)),
        "no batch last": (_no_batch, ("last",)),
        "accumulate": (_accumulate, ("fp16", 1, directory)),
    }
    return dict(zip(calls, run_in_turn(2, list(calls.values())), strict=True))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    directory = str(tmp_path_factory.mktemp("four"))
    calls = {"rows": (_replicas, ()), "accumulate": (_accumulate, ("fp32", 2, directory))}
    return dict(zip(calls, run_in_turn(4, list(calls.values())), strict=True))


def test_training_evaluation_and_prediction_in_turn_whichever_is_first(two: dict[str, list[Any]]) -> None:
    for result in two["in turn"]:
        assert max(result["errors"]) <= 1e-5, result["errors"]


@pytest.mark.parametrize("predict_on", ["all", "last"])
def test_a_model_without_a_loss_generates_with_growing_lengths(two: dict[str, list[Any]], predict_on: str) -> None:
    for rank, result in enumerate(two[f"generate {predict_on}"]):
        assert result["ids"] == result["expected"]
        assert result["nothing"] == {predict_on == "last" and rank == 0}
        assert result["kept"] <= 3
        assert result["grown"] == 0


@pytest.mark.parametrize("predict_on", ["all", "last"])
def test_an_output_that_cannot_be_put_together_is_named_on_every_rank(
    two: dict[str, list[Any]], predict_on: str
) -> None:
    for message in two[f"no batch {predict_on}"]:
        assert "an output of shape (3,) whose first dimension is not the batch's" in message


def test_replicas_put_their_rows_together(four: dict[str, list[Any]]) -> None:
    for error, shape in four["rows"]:
        assert error <= 1e-5
        assert shape == [5, 6, 30]


def test_an_optimizer_step_after_several_batches(two: dict[str, list[Any]], four: dict[str, list[Any]]) -> None:
    for results, tolerance in ((four, 1e-5), (two, 1e-3)):
        for result in results["accumulate"]:
            assert result["error"] <= tolerance
            assert "gradients of 1 of 2 batches" in result["message"]
