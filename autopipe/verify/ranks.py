"""What each rank of a verification runs: the step as a pipeline; its gradients go to a file, its loss to the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autopipe.api import pipeline
from autopipe.errors import ConfigError
from autopipe.verify.plain import SEED, STATE_FILE, Call, seed_all, surrogate_loss, without_dropout


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStep:
    """What a rank did: the loss, and the first and last module of its stage."""

    loss: float
    first_module: str
    last_module: str


def result_file(directory: Path, rank: int) -> Path:
    """Where a rank leaves its gradients, and rank 0 the buffers of all."""
    return directory / f"rank{rank}.pt"


def pipeline_step(
    build: Callable[[], Any],
    directory: Path,
    call: Call,
    rank: int,
    *,
    num_microbatches: int,
    schedule: str,
) -> RankStep:
    """One training step from the state in `directory`."""
    seed_all(SEED)
    model = build()[0]
    start = torch.load(directory / STATE_FILE, weights_only=False)
    _load(model, start["state"])
    if call.without_dropout:
        without_dropout(model)
    engine = pipeline(
        model,
        loss_fn=surrogate_loss if call.surrogate else None,
        data_parallel=1,
        num_microbatches=num_microbatches,
        schedule=schedule,
        device="cpu",
    )
    loss = engine.train_batch(*start["args"], **start["kwargs"])
    gradients = {n: p.grad for n, p in engine.named_parameters() if p.requires_grad}
    state = engine.state_dict()
    torch.save({"gradients": gradients, "state": state if rank == 0 else {}}, result_file(directory, rank))
    stage = engine.plan.stages[engine.stage]
    engine.close()
    return RankStep(loss=float(loss), first_module=stage.first_module, last_module=stage.last_module)


def _load(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    mine = model.state_dict()
    different = sorted(mine.keys() ^ state.keys()) or [n for n in mine if mine[n].shape != state[n].shape]
    if different:
        raise ConfigError(
            f"a factory that makes another model each time: {different[0]!r} differs",
            expected="the same parameters by name and shape in every process",
            where="verify",
            remedy="let the factory depend on nothing but its code",
        )
    model.load_state_dict(state)
