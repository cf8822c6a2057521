"""A model goes in; out comes whether a pipeline of local processes gives the plain model's loss, gradients and buffers."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from autopipe.verify.compare import Difference, Verification, compare
from autopipe.verify.plain import plain_step
from autopipe.verify.processes import run_processes
from autopipe.verify.ranks import pipeline_step
from autopipe.verify.show import verification_report

__all__ = ["Difference", "Verification", "verification_report", "verify"]

Build = Callable[[], tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]]


def verify(
    build: Build,
    *,
    num_stages: int,
    num_microbatches: int,
    schedule: str = "1f1b",
    tolerance: float | None = None,
    timeout_s: float = 300.0,
) -> Verification:
    """Trains one step as a pipeline of `num_stages` gloo processes of this machine, beside the plain model in this process.

    Both see the same parameters and the same micro-batches. The loss is the model's own; where it has none, a fixed one on its
    floating outputs. A model that draws random numbers is compared with dropout off.

    Args:
        build: returns model, args and kwargs of a whole batch; it is called in every process, so it must be picklable.
        num_stages, num_microbatches, schedule: of the pipeline.
        tolerance: the relative error that counts as equal; None: 1e-5 for float32, 1e-2 for 16 bits, 1e-9 for float64.
        timeout_s: after this long the processes are killed.

    Raises:
        AutopipeError: the model cannot be run as a pipeline, a process died, or the time is over.
    """
    with tempfile.TemporaryDirectory(prefix="autopipe-verify-") as place:
        directory = Path(place)
        plain = plain_step(build, num_microbatches, directory)
        step = functools.partial(
            pipeline_step, build, directory, plain.call, num_microbatches=num_microbatches, schedule=schedule
        )
        ranks = run_processes(step, num_stages, timeout_s=timeout_s)
        return compare(plain, ranks, directory, tolerance)
