"""Executes a rank's list of actions; a failure says in which stage, micro-batch and phase it happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from autopipe.engine.failures.failure import phase_of
from autopipe.engine.state.gradients import GradientSync
from autopipe.engine.step.stage_executor import StageRun
from autopipe.schedule import Action
from autopipe.schedule.actions import Kind


class ActionFailure(Exception):
    """An action raised; `phase` says which, in words."""

    def __init__(self, stage: int, phase: str, cause: BaseException) -> None:
        super().__init__(f"stage {stage}, {phase}: {type(cause).__name__}: {cause}")
        self.stage, self.phase, self.cause = stage, phase, cause


def run_actions(
    actions: Sequence[Action],
    runs: Mapping[int, StageRun],
    gradients: GradientSync,
    before_transfers: Callable[[], None],
) -> None:
    """Execute `actions` in order on this rank's stages.

    Receives are posted and sends started without blocking; a compute waits for what it reads.

    Args:
        runs: the stages of this rank.
        gradients: sums the gradients of tied parameters, and those of a stage after its last backward.
        before_transfers: called before the first send or receive; what it raises is raised as it is.

    Raises:
        ActionFailure: whatever an action raised, with its place.
    """
    perform = {stage: _methods(run, gradients) for stage, run in runs.items()}
    last = {a.stage: i for i, a in enumerate(actions) if a.kind in ("B", "W")}
    first = next((i for i, a in enumerate(actions) if a.peer >= 0), -1)
    for i, action in enumerate(actions):
        if i == first:
            before_transfers()
        try:
            perform[action.stage][action.kind](action)
            if last.get(action.stage) == i:
                gradients.stage_done(action.stage)
        except Exception as cause:
            raise ActionFailure(action.stage, phase_of(action), cause) from cause


def _methods(run: StageRun, gradients: GradientSync) -> dict[Kind, Callable[[Action], None]]:
    """The method that executes each kind of action of a stage."""
    backward: dict[Kind, Callable[[Action], None]] = {
        "B": run.backward,
        "I": run.input_gradients,
        "W": run.weight_gradients,
    }
    if torch._C._is_any_autocast_enabled():  # a backward runs in the dtypes that its forward chose
        backward = {kind: partial(_without_autocast, part) for kind, part in backward.items()}
    return {
        "RECV_F": run.receive,
        "RECV_B": run.receive,
        "F": run.forward,
        "SEND_F": run.send_forward,
        "SEND_B": run.send_backward,
        "REDUCE_GRAD": lambda action: gradients.reduce_tied(action.microbatch),
        **backward,
    }


def _without_autocast(part: Callable[[Action], None], action: Action) -> None:
    with torch._C._DisableAutocast():
        part(action)
