"""Whatever goes wrong with a file becomes a CheckpointError that says which file and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed.checkpoint as dcp

from autopipe.errors import CheckpointError

T = TypeVar("T")
KEPT = "check the disk and the path; the last whole checkpoint is untouched"
DAMAGED = "get the file again; this one is damaged or of another kind"


def named(work: Callable[[], T], where: Path, remedy: str = KEPT) -> T:
    """Does `work`; whatever goes wrong is a CheckpointError."""
    try:
        return work()
    except CheckpointError:
        raise
    except dcp.CheckpointException as several:  # torch's own, which is no Exception: it holds one for each rank
        first = next(iter(several.failures.values()))[0]
        raise (first if isinstance(first, CheckpointError) else fault(where, first, remedy)) from first
    except Exception as cause:
        raise fault(where, cause, remedy) from cause


def fault(where: Path, cause: BaseException, remedy: str = KEPT) -> CheckpointError:
    """The error for an exception that concerns a file."""
    told = str(cause).splitlines()[0] if str(cause) else "no message"
    return CheckpointError(f"{type(cause).__name__}: {told}", where=str(where), remedy=remedy)


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error behind another: where a write fails, torch's zip writer raises one about positions
    in its file."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause
