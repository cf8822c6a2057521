"""A failure, as all ranks name it: rank, stage, phase, and the message; and what was only noticed of
another's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from autopipe.errors import AutopipeError, EngineError
from autopipe.schedule import Action
from profiler.accelerator import ERROR_WORDS

BETWEEN_STEPS = "user code between steps"
MAX_MESSAGE = 8192
"""Characters of a message that are told to the other ranks."""

_PHASES = {
    "F": "forward of micro-batch {m}",
    "B": "backward of micro-batch {m}",
    "I": "backward of micro-batch {m}, input gradients",
    "W": "backward of micro-batch {m}, weight gradients",
    "SEND_F": "sending the activations of micro-batch {m} to stage {peer}",
    "RECV_F": "receiving the activations of micro-batch {m} from stage {peer}",
    "SEND_B": "sending the gradients of micro-batch {m} to stage {peer}",
    "RECV_B": "receiving the gradients of micro-batch {m} from stage {peer}",
    "REDUCE_GRAD": "summing the gradients of tied parameters",
}
_CONNECTION_WORDS = (
    "Connection closed",
    "Connection reset",
    "gloo",
    "Broken pipe",
    "Socket",
    "pair closure",
    *ERROR_WORDS,
)


def phase_of(action: Action) -> str:
    """An action in words."""
    return _PHASES[action.kind].format(m=action.microbatch, peer=action.peer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error of one rank.

    Attributes:
        rank: the rank it went wrong on.
        stage: the stage there; None before the model is placed.
        phase: what that rank was doing, in words.
        message: the exception, or what was seen of the rank.
        secondary: the rank has only lost a connection, so that the cause is another's.
    """

    rank: int
    stage: int | None
    phase: str
    message: str
    secondary: bool = False

    def __str__(self) -> str:
        stage = f"stage {self.stage} on " if self.stage is not None else ""
        return f"{stage}rank {self.rank}, {self.phase}: {self.message}"

    def error(self) -> EngineError:
        """The error that every rank raises."""
        return EngineError(str(self), remedy=f"mend the first cause, which is that of rank {self.rank}")

    def to_json(self) -> dict[str, Any]:
        """As it is told to other ranks."""
        return dataclasses.asdict(self) | {"message": self.message[:MAX_MESSAGE]}


def described(cause: BaseException) -> str:
    """An exception in one piece of text."""
    return f"{type(cause).__name__}: {cause}"


def is_connection_error(cause: BaseException) -> bool:
    """Whether a rank has only noticed that another is gone."""
    if isinstance(cause, AutopipeError) or not isinstance(cause, (RuntimeError, OSError)):
        return False
    text = str(cause)
    return any(word in text for word in _CONNECTION_WORDS)
