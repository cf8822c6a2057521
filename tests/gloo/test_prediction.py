"""What a plan expects of a run, beside what the run reports: memory to the byte, times and transfers that are there."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from typing import Any

import pytest
import torch

import autopipe
from autopipe.engine.step.clock import Span
from autopipe.engine.step.step_stats import transfer_times_us
from autopipe.schedule import Action
from scenarios.pipelines import TiedGPT, token_loss
from tests.gloo.launch import run_ranks


def report(num_microbatches: int) -> dict[str, Any]:
    os.environ["AUTOPIPE_COUNT_MEMORY"] = "1"
    torch.manual_seed(1)
    model, ids = TiedGPT(vocab=500, width=64, context=32), torch.randint(0, 500, (2 * num_microbatches, 32))
    model.head.weight = torch.nn.Parameter(model.wte.weight.detach().clone())  # untied: a stage each
    engine = autopipe.pipeline(
        model, loss_fn=token_loss, optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        data_parallel=1, num_microbatches=num_microbatches, schedule="1f1b",
    )  # fmt: skip
    for _ in range(3):
        engine.train_batch(ids, target=ids)
    found = json.loads(engine.report("json"))
    table, page = engine.report(), engine.report("html")
    engine.close()
    return {**found, "table": table, "page": page}


@pytest.mark.parametrize("num_microbatches", [2, 6])
def test_a_stage_holds_what_was_expected(num_microbatches: int) -> None:
    found = run_ranks(report, 2, num_microbatches, measured=True)[0]
    assert found["plan"]["link"]["buffered"]  # ranks of one host: neither holds a message that is under way
    for planned, measured in zip(found["plan"]["stages"], found["measured"], strict=True):
        assert measured["peak_bytes"] == pytest.approx(planned["expected_peak_bytes"], rel=0.03)
        assert measured["forward_us"] > 0 and measured["backward_us"] > 0 and measured["transfer_us"] >= 0
        assert measured["transfer_us"] <= measured["step_us"]
    assert "idle" in found["table"] and "transfer" in found["table"] and "MiB" in found["table"]
    assert "<svg" in found["page"]


def test_a_wait_is_idle_until_its_message_is_made() -> None:
    sender = (10_000, [Span(Action("F", 0, 0), False, 0.0, 50.0)])  # ends at 60 on the shared clock
    reader = (20_000, [Span(Action("RECV_F", 1, 0, 0), True, 10.0, 45.0), Span(Action("F", 1, 0), False, 45.0, 60.0)])
    assert transfer_times_us([sender, reader]) == {1: pytest.approx(5.0)}
    late = (20_000, [dataclasses.replace(reader[1][0], start_us=42.0)])
    assert transfer_times_us([sender, late]) == {1: pytest.approx(3.0)}
    assert transfer_times_us([None, reader]) == {1: pytest.approx(35.0)}
