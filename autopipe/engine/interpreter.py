"""Executes a rank's list of actions; a failure says which stage, rank, micro-batch and phase it happened in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autopipe.engine.stage_run import StageRun
from autopipe.schedule import Action

_PHASES = {
    "F": "forward of micro-batch {m}",
    "B": "backward of micro-batch {m}",
    "SEND_F": "sending the activations of micro-batch {m} to stage {peer}",
    "RECV_F": "receiving the activations of micro-batch {m} from stage {peer}",
    "SEND_B": "sending the gradients of micro-batch {m} to stage {peer}",
    "RECV_B": "receiving the gradients of micro-batch {m} from stage {peer}",
    "REDUCE_GRAD": "summing the gradients of tied parameters",
}


class ActionFailure(Exception):
    """An action raised; `phase` says which, in words."""

    def __init__(self, phase: str, cause: BaseException) -> None:
        super().__init__(f"{phase}: {type(cause).__name__}: {cause}")
        self.phase, self.cause = phase, cause


def run_actions(actions: Sequence[Action], run: StageRun, reduce: Callable[[int], None]) -> None:
    """Executes `actions` in order on the stage of `run`.

    Receives are posted and sends started without blocking; a compute waits for what it reads. `reduce` sums the gradients of
    one group of tied parameters.

    Raises:
        ActionFailure: whatever an action raised, with its place.
    """
    for action in actions:
        try:
            _execute(action, run, reduce)
        except Exception as cause:
            phase = _PHASES[action.kind].format(m=action.microbatch, peer=action.peer)
            raise ActionFailure(phase, cause) from cause


def _execute(action: Action, run: StageRun, reduce: Callable[[int], None]) -> None:
    match action.kind:
        case "RECV_F" | "RECV_B":
            run.receive(action)
        case "F":
            run.forward(action.microbatch)
        case "SEND_F":
            run.send_forward(action)
        case "B":
            run.backward(action.microbatch)
        case "SEND_B":
            run.send_backward(action)
        case "REDUCE_GRAD":
            reduce(action.microbatch)
        case _:
            raise AssertionError(f"no such action: {action}")
