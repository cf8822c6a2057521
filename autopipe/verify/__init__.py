"""Compare a pipeline of local processes with the plain model.

A function that builds a model and its batch becomes a `Verification`: the differences in loss, gradients and buffers.
Read this file first, then `ranks.py` and `compare.py`.

A model becomes a `Verification`. Read `__init__.py`, then `ranks.py` and `compare.py`.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from autopipe.errors import ConfigError
from autopipe.schedule.kinds import DEFAULT, KINDS
from autopipe.verify.compare import Difference, Verification, compare
from autopipe.verify.plain import plain_step
from autopipe.verify.processes import run_processes
from autopipe.verify.ranks import pipeline_step
from autopipe.verify.show import verification_report

__all__ = ["Difference", "Verification", "verification_report", "verify"]

STAGES_A_RANK = 2
"""Stages of each process under a schedule that puts several on a rank."""

Build = Callable[[], tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]]


def verify(
    build: Build,
    *,
    num_stages: int,
    num_microbatches: int,
    schedule: str = DEFAULT,
    tolerance: float | None = None,
    timeout_s: float = 300.0,
) -> Verification:
    """Train one step as a pipeline of gloo processes of this machine, and as the plain model in this process.

    Both see the same parameters and the same micro-batches. The loss is the model's own; if it has none, a fixed one
    on its floating outputs. A model that draws random numbers is compared with dropout off.

    Args:
        build: returns model, args and kwargs of a whole batch; it is called in every process, so it must be picklable.
        num_stages, num_microbatches, schedule: of the pipeline. There is a process for each stage; under a schedule
            with several stages a rank, for every two.
        tolerance: the relative error that counts as equal; None: 1e-5 for float32, 1e-2 for 16 bits, 1e-9 for float64.
        timeout_s: after this long the processes are killed.

    Raises:
        ConfigError: the schedule puts two stages on each process, and their number is odd.
        AutopipeError: the model cannot be run as a pipeline, a process died, or the time is over.
    """
    num_ranks = _num_processes(num_stages, schedule)
    with tempfile.TemporaryDirectory(prefix="autopipe-verify-") as place:
        directory = Path(place)
        plain = plain_step(build, num_microbatches, directory)
        step = functools.partial(
            pipeline_step,
            build,
            directory,
            plain.mode,
            num_stages=num_stages,
            num_microbatches=num_microbatches,
            schedule=schedule,
        )
        ranks = run_processes(step, num_ranks, timeout_s=timeout_s)
        return compare(plain, ranks, directory, tolerance, num_stages=num_stages)


def _num_processes(num_stages: int, schedule: str) -> int:
    if not KINDS[schedule].several_stages_a_rank:
        return num_stages
    if num_stages % STAGES_A_RANK:
        raise ConfigError(
            f"{num_stages} stages under {schedule}",
            expected=f"a multiple of {STAGES_A_RANK}: each process runs {STAGES_A_RANK} stages",
            where="verify",
            remedy=f"verify with {num_stages + 1} stages, or with schedule {DEFAULT}",
        )
    return num_stages // STAGES_A_RANK
