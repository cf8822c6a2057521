"""A checkpoint is written: aside, by all ranks together, then published by one of them. It is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from autopipe.checkpoint.faults import named
from autopipe.checkpoint.folders import SCHEMA, begin, discard, publish, published, sealed, writing
from autopipe.checkpoint.readers import Stored
from autopipe.checkpoint.tensors import expect_one_process, write_tensors
from autopipe.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The ranks that write a checkpoint together.

    Attributes:
        coordinator: this rank makes the folder, writes what is no tensor, and publishes.
        group: a process group on the CPU; None with one process.
        agree: does work on every rank, and raises the first rank's error on all.
        gather: the values of all ranks, on every rank.
    """

    coordinator: bool
    group: Any
    agree: Callable[[Callable[[], Any]], Any]
    gather: Callable[[Any], list[Any]]


ALONE = Ranks(coordinator=True, group=None, agree=lambda work: work(), gather=lambda value: [value])


def plain(meta: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """A copy of what a checkpoint holds beside tensors.

    Raises:
        CheckpointError: something in it is more than JSON can hold.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(meta))
    except (TypeError, ValueError, RecursionError) as cause:
        raise CheckpointError(
            f"{type(cause).__name__}: {cause}",
            expected="numbers, texts, lists and dicts, as JSON has them",
            where=str(where),
            remedy="put only such values into client_state and into the scheduler's state",
        ) from cause
    return copy


def write(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, Tensor | Stored],
    meta: Mapping[str, Any],
    *,
    ranks: Ranks = ALONE,
    keep: int | None = None,
) -> Path:
    """Writes a checkpoint. Collective: every rank passes the tensors that it saves; keys are unique over the ranks.

    Args:
        keep: whole checkpoints to keep, this one included; None keeps all.

    Raises:
        CheckpointError: it could not be written; earlier ones stand.
    """
    root = Path(directory)
    expect_one_process()
    ranks.agree(lambda: named(lambda: begin(root, step) if ranks.coordinator else None, root))
    try:
        sums = ranks.agree(lambda: named(lambda: write_tensors(writing(root, step), tensors, ranks.group), root))
        checksums = {key: value for part in ranks.gather(sums) for key, value in part.items()}
        text = sealed({"schema": SCHEMA, "step": step, **meta, "checksums": checksums})
        ranks.agree(lambda: named(lambda: publish(root, step, text, keep) if ranks.coordinator else None, root))
    except CheckpointError:
        if ranks.coordinator:
            discard(root, step)
        raise
    return published(root, step)
