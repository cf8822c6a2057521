"""Loss, every gradient and every buffer of a pipeline equal those of the plain model, for any number of stages and
micro-batches."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scenarios.pipelines import NAMES, make
from tests.gloo.launch import run_ranks
from tests.gloo.plain import plain_step, relative_error

BATCH = 12
TOLERANCE = 1e-6
SKIPPING_CUTS = ["down.2", "up.0", "up.2"]


def _train_twice(name: str, num_microbatches: int, schedule: str, stages_a_rank: int = 1) -> dict[str, Any]:
    """Two calls without zero_grad beside two plain steps; the largest relative errors on this rank."""
    import autopipe

    model, args, kwargs, target, loss_fn = make(name, BATCH)
    plain = copy.deepcopy(model)
    num_stages = stages_a_rank * dist.get_world_size()
    engine = autopipe.pipeline(
        model,
        loss_fn=loss_fn,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        schedule=schedule,
        split_points=SKIPPING_CUTS if name == "unet" and num_stages == 4 else None,
    )
    loss = engine.train_batch(*args, target=target, **kwargs)
    plain_loss = plain_step(plain, args, kwargs, target, loss_fn, num_microbatches)
    expected = {n: p.grad for n, p in plain.named_parameters()}
    once, errors = {}, {}
    for n, p in engine.named_parameters():
        assert (p.grad is None) == (expected[n] is None), n
        if p.grad is not None:
            once[n], errors[n] = p.grad.clone(), relative_error(p.grad, expected[n])
    state, plain_state = engine.state_dict(), plain.state_dict()
    assert list(state) == list(plain_state)
    buffers = {n: relative_error(state[n].double(), b.double()) for n, b in plain.named_buffers()}
    engine.train_batch(*args, target=target, **kwargs)
    twice = all(torch.equal(p.grad, 2 * once[n]) for n, p in engine.named_parameters() if n in once)
    transfers = [(t.source, t.target, t.nodes) for t in engine.plan.transfers]
    covered = [n for n, _ in engine.named_parameters()]
    engine.close()
    return {
        "loss": abs(float(loss) - plain_loss) / abs(plain_loss),
        "gradient": max(errors.values(), default=0.0),
        "buffer": max(buffers.values(), default=0.0),
        "twice": twice,
        "transfers": transfers,
        "covered": covered,
        "all": list(expected),
    }


def _all_counts(name: str, num_stages: int, schedule: str) -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    counts = sorted({1, 2, max(1, num_stages - 1), num_stages, 3 * num_stages})
    return [_train_twice(name, m, schedule) for m in counts]


def _some_counts(cases: list[tuple[str, str]], counts: list[int]) -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    return [
        {"case": (name, schedule, m), **_train_twice(name, m, schedule, 2 if schedule == "interleaved" else 1)}
        for name, schedule in cases
        for m in counts
    ]


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_the_plain_models(name: str, num_stages: int) -> None:
    measured = (name, num_stages) in (("gpt", 3), ("resnet", 2))
    ranks = run_ranks(_all_counts, num_stages, name, num_stages, "1f1b", measured=measured)
    for results in ranks:
        for result in results:
            assert result["loss"] <= TOLERANCE
            assert result["gradient"] <= TOLERANCE
            assert result["buffer"] <= TOLERANCE
            assert result["twice"]
    for results in zip(*ranks, strict=True):
        covered = set().union(*(r["covered"] for r in results))
        assert covered == set(results[0]["all"])
    if name == "unet" and num_stages == 4:
        transfers = ranks[0][0]["transfers"]
        assert any((source, target) == (0, 3) for source, target, _ in transfers)
        readers: dict[str, set[int]] = {}
        for _, target, nodes in transfers:
            for node in nodes:
                readers.setdefault(node, set()).add(target)
        assert max(map(len, readers.values())) >= 2


OTHER_SCHEDULES = {
    2: [("gpt", "interleaved"), ("unet", "interleaved"), ("encoder_decoder", "interleaved"), ("frozen", "zb-h1")],
    3: [("gpt", "eager-1f1b"), ("gpt", "gpipe"), ("resnet", "zb-h1"), ("encoder_decoder", "zb-h1")],
    4: [("unet", "eager-1f1b"), ("unet", "zb-h1"), ("gpt", "zb-h1"), ("unet", "gpipe")],
}


@pytest.mark.parametrize("num_ranks", list(OTHER_SCHEDULES))
def test_every_schedule_gives_the_same_gradients(num_ranks: int) -> None:
    for results in run_ranks(_some_counts, num_ranks, OTHER_SCHEDULES[num_ranks], [2 * num_ranks + 1]):
        for result in results:
            assert max(result["loss"], result["gradient"], result["buffer"]) <= TOLERANCE, result
            assert result["twice"], result


def _over_sockets(cases: list[tuple[str, str]], counts: list[int]) -> list[dict[str, Any]]:
    os.environ["AUTOPIPE_SHARED_MEMORY"] = "0"
    return _some_counts(cases, counts)


def test_sockets_give_the_same_gradients() -> None:
    for results in run_ranks(_over_sockets, 3, [("unet", "1f1b"), ("encoder_decoder", "eager-1f1b")], [7]):
        for result in results:
            assert max(result["loss"], result["gradient"], result["buffer"]) <= TOLERANCE, result


def _uneven_then_other_lengths(schedules: list[str]) -> list[tuple[str, float]]:
    """Batches that do not divide, fewer samples than micro-batches, and other lengths, one after another on one
    engine."""
    import autopipe

    dist.init_process_group("gloo")
    errors = []
    for schedule in schedules:
        model, _, _, _, loss_fn = make("gpt", 1)
        plain = copy.deepcopy(model)
        num_stages = (2 if schedule == "interleaved" else 1) * dist.get_world_size()
        engine = autopipe.pipeline(
            model, loss_fn=loss_fn, num_stages=num_stages, num_microbatches=3, schedule=schedule, max_grad_norm=None
        )
        for batch, length in ((7, 12), (2, 12), (5, 8), (3, 12)):
            ids, labels = torch.randint(0, 50, (batch, length)), torch.randint(0, 50, (batch, length))
            engine.train_batch(ids, target=labels)
            plain_step(plain, (ids,), {}, labels, loss_fn, 3)
            expected = dict(plain.named_parameters())
            for n, p in engine.named_parameters():
                assert p.grad is not None
                errors.append((f"{schedule} {batch} {length} {n}", relative_error(p.grad, expected[n].grad)))
        engine.close()
    return errors


@pytest.mark.parametrize("schedules", [["1f1b", "eager-1f1b", "gpipe", "zb-h1"], ["interleaved"]])
def test_uneven_batches_and_other_lengths(schedules: list[str]) -> None:
    errors = [e for rank in run_ranks(_uneven_then_other_lengths, 2, schedules) for e in rank]
    assert max(e for _, e in errors) <= TOLERANCE, max(errors, key=lambda e: e[1])


def _evaluate(name: str) -> dict[str, float]:
    import autopipe

    model, args, kwargs, target, loss_fn = make(name, BATCH)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(
        model, args, kwargs, example_target=target, loss_fn=loss_fn, data_parallel=1, num_microbatches=4
    )
    loss = engine.eval_batch(*args, target=target, **kwargs)
    output = engine.predict(*args, **kwargs)
    plain.eval()
    with torch.no_grad():
        expected = plain(*args, **kwargs)
        plain_loss = expected["loss"] if loss_fn is None else loss_fn(expected, target)
    assert type(output) is type(expected)
    if isinstance(expected, dict):
        assert list(output) == list(expected)
        assert output["nothing"] is None
        output, expected = output["logits"], expected["logits"]
    assert torch.equal(engine.state_dict()[next(iter(plain.state_dict()))], next(iter(plain.state_dict().values())))
    engine.close()
    return {"loss": abs(float(loss - plain_loss)), "output": relative_error(output, expected)}


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_before_any_training_equals_the_plain_models(name: str) -> None:
    for result in run_ranks(_evaluate, 3, name):
        assert result["loss"] <= 1e-5
        assert result["output"] <= 1e-5


def _train_with_optimizer(num_steps: int) -> dict[str, float]:
    from functools import partial

    import autopipe

    model, args, kwargs, target, loss_fn = make("gpt", BATCH)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2),
        max_grad_norm=0.5,
        data_parallel=1,
        num_microbatches=4,
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    norms = 0.0
    for _ in range(num_steps):
        engine.train_batch(*args, target=target)
        optimizer.zero_grad()
        plain_step(plain, args, kwargs, target, loss_fn, 4)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        assert engine.grad_norm is not None
        norms = max(norms, abs(engine.grad_norm - float(norm)) / float(norm))
    state = engine.state_dict()
    error = max(relative_error(state[n], p) for n, p in plain.state_dict().items())
    drift = relative_error(state["head.weight"], state["wte.weight"])
    engine.close()
    return {"parameters": error, "norm": norms, "drift": drift}


def test_optimizer_scheduler_and_clipping_follow_the_plain_run_and_ties_stay_tied() -> None:
    for result in run_ranks(_train_with_optimizer, 3, 5):
        assert result["parameters"] <= 1e-5
        assert result["norm"] <= 1e-5
        assert result["drift"] == 0.0
