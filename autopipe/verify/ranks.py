"""The step of each rank of a verification: its gradients go to a file, its loss to the caller."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autopipe.api import pipeline
from autopipe.errors import ConfigError
from autopipe.verify.plain import SEED, STATE_FILE, StepMode, seed_all, surrogate_loss, without_dropout


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStep:
    """The loss that a rank was given; its gradients are in its `result_file`."""

    loss: float


def result_file(directory: Path, rank: int) -> Path:
    """The file of a rank's gradients, and on rank 0 of all buffers."""
    return directory / f"rank{rank}.pt"


def pipeline_step(
    build: Callable[[], Any],
    directory: Path,
    mode: StepMode,
    rank: int,
    *,
    num_stages: int,
    num_microbatches: int,
    schedule: str,
) -> RankStep:
    """One training step from the state in `directory`."""
    seed_all(SEED)
    model = build()[0]
    start = torch.load(directory / STATE_FILE, weights_only=False)
    _load(model, start["state"])
    if mode.without_dropout:
        without_dropout(model)
    engine = pipeline(
        model,
        loss_fn=surrogate_loss if mode.surrogate else None,
        data_parallel=1,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        schedule=schedule,
        device="cpu",
    )
    loss = engine.train_batch(*start["args"], **start["kwargs"])
    gradients = {n: p.grad for n, p in engine.named_parameters() if p.requires_grad}
    state = engine.state_dict()
    mine = engine.plan.stages[engine.stage :: int(os.environ["WORLD_SIZE"])]
    stage_of = {name: next((s.index for s in mine if name in s.params), engine.stage) for name in gradients}
    saved = {"gradients": gradients, "stages": stage_of, "state": state if rank == 0 else {}}
    torch.save(saved, result_file(directory, rank))
    engine.close()
    return RankStep(loss=float(loss))


def _load(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    mine = model.state_dict()
    different = sorted(mine.keys() ^ state.keys()) or [n for n in mine if mine[n].shape != state[n].shape]
    if different:
        raise ConfigError(
            f"a factory that makes a different model each time: {different[0]!r} differs",
            expected="the same parameters by name and shape in every process",
            where="verify",
            remedy="make the factory deterministic: the same parameters on every call",
        )
    model.load_state_dict(state)
