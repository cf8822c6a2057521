"""Recompute in a pipeline: gradients and buffers of the plain model, and no rank above the memory that its stage was
given."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scenarios.pipelines import TiedGPT, make, token_loss
from tests.gloo.launch import run_ranks
from tests.gloo.plain import plain_step, relative_error


def _train(name: str) -> dict[str, float]:
    import autopipe

    dist.init_process_group("gloo")
    model, args, kwargs, target, loss_fn = make(name, 12)
    plain = copy.deepcopy(model)
    engine = autopipe.pipeline(model, loss_fn=loss_fn, data_parallel=1, num_microbatches=6, recompute="full")
    loss = engine.train_batch(*args, target=target, **kwargs)
    expected = plain_step(plain, args, kwargs, target, loss_fn, 6)
    gradients = dict(plain.named_parameters())
    errors = [relative_error(p.grad, gradients[n].grad) for n, p in engine.named_parameters() if p.grad is not None]
    state, buffers = engine.state_dict(), dict(plain.named_buffers())
    buffer = max((relative_error(state[n].double(), b.double()) for n, b in buffers.items()), default=0.0)
    regions = len(engine.plan.stages[dist.get_rank()].recompute)
    engine.close()
    return {"loss": abs(float(loss) / expected - 1), "gradient": max(errors), "buffer": buffer, "regions": regions}


@pytest.mark.parametrize("name", ["resnet"])
def test_gradients_and_buffers_are_those_of_the_plain_model(name: str) -> None:
    for result in run_ranks(_train, 3, name):
        assert result["regions"]
        assert max(result["loss"], result["gradient"], result["buffer"]) <= 1e-6


def _measure(shares: list[float]) -> list[dict[str, Any]]:
    """Under limits that leave each share of the activations: what this rank's stage was given, and what it held."""
    import autopipe
    from profiler.memory import peak_memory

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (32, 64))
    limit, found = None, []
    for share in shares:
        torch.manual_seed(1)
        engine = autopipe.pipeline(
            TiedGPT(64, 64, 8, 64),
            loss_fn=token_loss,
            optimizer=torch.optim.SGD,
            data_parallel=1,
            num_microbatches=8,
            memory_limit=limit and int(limit * share),
        )
        loss = engine.train_batch(ids, target=ids.roll(-1, 1))
        with peak_memory(torch.device("cpu")) as peak:
            engine.train_batch(ids, target=ids.roll(-1, 1))
            for parameter in engine.parameters():  # what is measured next would count their release
                parameter.grad = None
        stage = engine.plan.stages[dist.get_rank()]
        # gradients are made in the step; those let go before are not seen. The plan counts with Adam's state; here is
        # none.
        static = stage.param_bytes + stage.optimizer_bytes
        found.append(
            {
                "loss": float(loss),
                "held": static + peak.num_bytes,
                "planned": stage.peak_bytes,
                "limit": engine.plan.memory_limit_bytes,
                "regions": len(stage.recompute),
            }
        )
        limit = limit or max(s.peak_bytes for s in engine.plan.stages)
        engine.close()
    return found


def test_the_memory_that_is_measured_obeys_the_limit() -> None:
    ranks = run_ranks(_measure, 2, [1.0, 0.6], measured=True, fresh=True)
    for free, *capped in ranks:
        for result in capped:
            assert result["loss"] == pytest.approx(free["loss"], rel=1e-6)
            assert result["planned"] <= result["limit"]
            assert result["held"] <= result["limit"], result
    assert any(rank[1]["regions"] for rank in ranks)
