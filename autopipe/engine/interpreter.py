"""Executes a rank's list of actions; a failure says which stage, rank, micro-batch and phase it happened in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from autopipe.engine.failure import phase_of
from autopipe.engine.stage_run import StageRun
from autopipe.schedule import Action


class ActionFailure(Exception):
    """An action raised; `phase` says which, in words."""

    def __init__(self, stage: int, phase: str, cause: BaseException) -> None:
        super().__init__(f"stage {stage}, {phase}: {type(cause).__name__}: {cause}")
        self.stage, self.phase, self.cause = stage, phase, cause


def run_actions(
    actions: Sequence[Action],
    runs: Mapping[int, StageRun],
    reduce: Callable[[int], None],
    stage_done: Callable[[int], None],
    before_transfers: Callable[[], None],
) -> None:
    """Executes `actions` in order on this rank's stages.

    Receives are posted and sends started without blocking; a compute waits for what it reads.

    Args:
        runs: the stages of this rank.
        reduce: sums the gradients of one group of tied parameters.
        stage_done: is told of a stage whose last backward has run.
        before_transfers: is called before the first send or receive; what it raises is raised as it is.

    Raises:
        ActionFailure: whatever an action raised, with its place.
    """
    last = {a.stage: i for i, a in enumerate(actions) if a.kind in ("B", "W")}
    first = next((i for i, a in enumerate(actions) if a.peer >= 0), -1)
    for i, action in enumerate(actions):
        if i == first:
            before_transfers()
        try:
            _execute(action, runs[action.stage], reduce)
            if last.get(action.stage) == i:
                stage_done(action.stage)
        except Exception as cause:
            raise ActionFailure(action.stage, phase_of(action), cause) from cause


def _execute(action: Action, run: StageRun, reduce: Callable[[int], None]) -> None:
    match action.kind:
        case "RECV_F" | "RECV_B":
            run.receive(action)
        case "F":
            run.forward(action)
        case "SEND_F":
            run.send_forward(action)
        case "SEND_B":
            run.send_backward(action)
        case "REDUCE_GRAD":
            reduce(action.microbatch)
        case "B" | "I" | "W":
            part = {"B": run.backward, "I": run.input_gradients, "W": run.weight_gradients}[action.kind]
            with torch._C._DisableAutocast():  # a backward runs in the dtypes that its forward chose
                part(action)
