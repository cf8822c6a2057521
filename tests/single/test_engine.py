"""The engine on one process: a script can be debugged as it is, and follows plain PyTorch."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autopipe
from autopipe.engine.step.microbatch import normalised, raw_weights, split
from scenarios.pipelines import make


def test_a_plain_loop_with_an_optimizer_of_ones_own() -> None:
    model, args, _, target, loss_fn = make("gpt", 8)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(model, args, example_target=target, loss_fn=loss_fn, num_microbatches=1)
    ours, theirs = torch.optim.SGD(engine.parameters(), lr=0.1), torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        ours.zero_grad()
        loss = engine.train_batch(*args, target=target)
        ours.step()
        theirs.zero_grad()
        expected = loss_fn(plain(*args), target)
        expected.backward()
        theirs.step()
        assert torch.equal(loss, expected.detach())
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), n


def test_the_model_s_own_training_flags_are_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    model[1].eval()
    x, target = torch.randn(8, 4), torch.randn(8, 4)
    engine = autopipe.pipeline(model, loss_fn=F.mse_loss)
    engine.train_batch(x, target=target)
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    assert engine.eval_batch(x, target=target) == engine.eval_batch(x, target=target)
    engine.train_batch(x, target=target)
    assert model[2].training
    assert not model[1].training


def test_changing_shapes_and_short_batches() -> None:
    model, args, _, target, loss_fn = make("gpt", 8)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(model, loss_fn=loss_fn, num_microbatches=4)
    for rows, length in ((8, 12), (6, 12), (3, 7), (8, 12)):
        ids, labels = args[0][:rows, :length], target[:rows, :length]
        loss = engine.train_batch(ids, target=labels)
        expected = loss_fn(plain(ids), labels)
        expected.backward()
        assert torch.allclose(loss, expected.detach(), rtol=1e-5)
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), n


def test_loss_weight_makes_a_token_mean_the_whole_batch_s() -> None:
    model, args, _, target, _ = make("gpt", 8)
    plain = copy.deepcopy(model)
    target[1:, 3:] = -100

    def loss_fn(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.flatten(0, 1), labels.flatten())

    engine = autopipe.pipeline(
        model, loss_fn=loss_fn, num_microbatches=4, loss_weight=lambda labels: (labels != -100).sum()
    )
    loss = engine.train_batch(*args, target=target)
    expected = loss_fn(plain(*args), target)
    expected.backward()
    assert torch.allclose(loss, expected.detach(), rtol=1e-6)
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), n


def test_bf16_loss_is_float32() -> None:
    model, args, _, target, loss_fn = make("gpt", 8)
    engine = autopipe.pipeline(
        model, loss_fn=loss_fn, precision="bf16", optimizer=partial(torch.optim.AdamW, lr=1e-2), num_microbatches=2
    )
    losses = [engine.train_batch(*args, target=target) for _ in range(4)]
    assert all(loss.dtype == torch.float32 for loss in losses)
    assert losses[-1] < losses[0]


def test_a_loss_function_may_run_any_python() -> None:
    seen: list[float] = []

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = F.mse_loss(output, target)
        seen.append(loss.item())
        return loss if loss.item() > 0 else loss * 0

    engine = autopipe.pipeline(nn.Linear(4, 4), loss_fn=loss_fn, num_microbatches=2)
    engine.train_batch(torch.randn(4, 4), target=torch.randn(4, 4))
    before = len(seen)
    engine.train_batch(torch.randn(4, 4), target=torch.randn(4, 4))
    assert len(seen) == before + 2


def test_report_and_trace(tmp_path: Path) -> None:
    model, args, _, target, loss_fn = make("gpt", 8)
    engine = autopipe.pipeline(model, loss_fn=loss_fn)
    engine.train_batch(*args, target=target)
    assert "Two training steps are needed" in engine.report()
    for _ in range(3):
        engine.train_batch(*args, target=target)
    assert "Predicted and measured" in engine.report()
    engine.trace(f"{tmp_path}/trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["name"], e["args"]["name"]) for e in events if e["ph"] == "M" and "name" in e["args"]}
    assert names >= {("process_name", "rank 0"), ("thread_name", "compute")}
    forward, backward = (e for e in events if e["ph"] == "X")  # one micro-batch of the last step
    assert [(e["name"], e["cat"]) for e in (forward, backward)] == [("0F0", "forward"), ("0B0", "backward")]
    assert forward["args"] == {"stage": 0, "microbatch": 0, "peer": -1}
    assert forward["dur"] > 0 and backward["dur"] > 0
    assert forward["ts"] + forward["dur"] <= backward["ts"]


def test_a_batch_is_split_along_its_first_dimension_only_where_that_is_the_batch() -> None:
    parts = split((torch.arange(10), torch.zeros(3, 3)), {"flag": True}, torch.arange(10) * 2, 4)
    assert [p.num_samples for p in parts] == [3, 3, 2, 2]
    assert torch.equal(torch.cat([p.args[0] for p in parts]), torch.arange(10))
    assert torch.equal(torch.cat([p.target for p in parts]), torch.arange(10) * 2)
    assert all(p.args[1].shape == (3, 3) and p.kwargs == {"flag": True} for p in parts)
    assert normalised(raw_weights(parts, None), 10) == [0.3, 0.3, 0.2, 0.2]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_microbatches", 0),
        ("num_stages", -1),
        ("schedule", "2f2b"),
        ("precision", "int4"),
        ("max_grad_norm", -1.0),
        ("optimizer", 3),
        ("device", "gpu"),
    ],
)
def test_wrong_settings_are_named(setting: str, value: object) -> None:
    with pytest.raises(autopipe.ConfigError, match=rf"{setting}.*remedy"):
        autopipe.pipeline(nn.Linear(4, 4), loss_fn=F.mse_loss, **{setting: value})


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_stages_give_the_plain_gradients() -> None:
    model, x, target = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(4, 4), torch.randn(4, 4)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(model, loss_fn=F.mse_loss, num_stages=2, num_microbatches=2, compile=True)
    engine.train_batch(x, target=target)
    F.mse_loss(plain(x), target).backward()
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), n


class TakesTarget(nn.Module):
    """Has an argument of the name that `train_batch` gives to a loss function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.layer(x), target)


def test_without_a_loss_function_the_target_is_the_models() -> None:
    model, x, target = TakesTarget(), torch.randn(4, 4), torch.randn(4, 4)
    engine = autopipe.pipeline(model, num_microbatches=2)
    assert float(engine.train_batch(x, target=target)) == pytest.approx(model(x, target).item(), rel=1e-6)
    assert float(engine.eval_batch(x, target=target)) == pytest.approx(model(x, target).item(), rel=1e-6)
    engine.close()


class Fp32Region(nn.Module):
    """A layer that leaves autocast: its backward is to leave it too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.exact, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        with torch.autocast("cpu", enabled=False):
            x = self.exact(x.float())
        return self.last(x)


def test_backwards_have_the_dtypes_of_their_forwards() -> None:
    model, x, target = Fp32Region(), torch.randn(8, 8), torch.randn(8, 8)
    plain = copy.deepcopy(model)
    autopipe.pipeline(model, loss_fn=F.mse_loss, precision="bf16").train_batch(x, target=target)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.mse_loss(plain(x), target)
    loss.backward()
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), n
