"""Folders of checkpoints: the newest whole one of a directory is found, a new one is published by one rename, old ones
are removed.

DIRECTORY/step-00000120/meta.json     step, plan, optimizer options, scheduler, loss scale, seed, the user's own state
DIRECTORY/step-00000120/.metadata     which tensor lies where
DIRECTORY/step-00000120/*.distcp      the tensors
DIRECTORY/step-00000120.replaced      the earlier one of a step that is saved again, for the moment between two renames
DIRECTORY/.writing-step-…             one that is being written, or that a crash has left; the next save removes it
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autopipe.checkpoint.faults import fault
from autopipe.errors import CheckpointError

SCHEMA = "autopipe.checkpoint/1"
META, METADATA = "meta.json", ".metadata"
PREFIX, _WRITING, _REPLACED = "step-", ".writing-", ".replaced"


def newest(directory: str | Path) -> Path:
    """The newest whole checkpoint in a directory, or the directory itself where it is one.

    Raises:
        CheckpointError: there is none.
    """
    root = Path(directory)
    if (root / META).is_file():
        return root
    whole = _whole(root)
    if not whole:
        raise CheckpointError(
            f"no whole checkpoint in {str(root)!r}",
            expected=f"a folder {PREFIX}… with {META} in it",
            remedy="pass the directory that was given to save_checkpoint()",
        )
    return whole[-1]


def _whole(root: Path) -> list[Path]:
    """The whole checkpoints of a directory by step; the replaced one of a step before the one that replaces it."""
    found = [
        (int(match[1]), match[2] is None, path)
        for path in root.glob(f"{PREFIX}*")
        if (match := re.fullmatch(rf"{PREFIX}(\d{{1,18}})({re.escape(_REPLACED)})?", path.name))
        and (path / META).is_file()
        and (path / METADATA).is_file()
    ]
    return [path for *_, path in sorted(found)]


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """All of a checkpoint that is no tensor.

    Raises:
        CheckpointError: it cannot be read, or is of another schema.
    """
    try:
        meta = json.loads((checkpoint / META).read_text())
    except (OSError, ValueError, RecursionError) as cause:
        raise fault(checkpoint / META, cause) from cause
    if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
        got = meta.get("schema") if isinstance(meta, dict) else type(meta).__name__
        raise CheckpointError(
            f"schema {got!r}",
            expected=repr(SCHEMA),
            where=str(checkpoint / META),
            remedy="load a checkpoint that autopipe wrote",
        )
    if meta.get("digest") != _digest(meta):
        raise CheckpointError(
            f"other text than was written, digest {meta.get('digest')!r:.40}",
            expected="the digest that was written with it",
            where=str(checkpoint / META),
            remedy="load an earlier checkpoint: pass its step-… folder",
        )
    return meta


def sealed(meta: Mapping[str, Any]) -> str:
    """The text of `meta.json`, with a digest of the rest in it."""
    return json.dumps({**meta, "digest": _digest(meta)})


def _digest(meta: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in meta.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def begin(root: Path, step: int) -> None:
    """Makes the folder in which a step is written, empty, and removes what crashes have left."""
    for left in root.glob(f"{_WRITING}*"):
        shutil.rmtree(left)
    for replaced in root.glob(f"{PREFIX}*{_REPLACED}"):
        if (replaced.with_name(replaced.name.removesuffix(_REPLACED)) / META).is_file():
            shutil.rmtree(replaced)
    writing(root, step).mkdir(parents=True)


def writing(root: Path, step: int) -> Path:
    """The folder in which a step is written."""
    return root / f"{_WRITING}{published(root, step).name}"


def published(root: Path, step: int) -> Path:
    """The folder of a step."""
    return root / f"{PREFIX}{step:08d}"


def discard(root: Path, step: int) -> None:
    """Removes a step that could not be written."""
    shutil.rmtree(writing(root, step), ignore_errors=True)


def publish(root: Path, step: int, meta: str, keep: int | None) -> Path:
    """Adds `meta.json` to a written step and gives it its name. At every moment a whole checkpoint is there, if one was
    before."""
    aside, final = writing(root, step), published(root, step)
    with open(aside / META, "w") as file:
        file.write(meta)
        file.flush()
        os.fsync(file.fileno())
    _sync(aside)
    if final.exists():
        replaced = final.with_name(final.name + _REPLACED)
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        aside.rename(final)
        _remove(replaced)
    else:
        aside.rename(final)
    _sync(root)
    if keep is not None:
        for old in _whole(root)[:-keep]:
            _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Takes the name away first, so that a half removed checkpoint is never taken for a whole one."""
    nameless = checkpoint.with_name(f"{_WRITING}removed-{checkpoint.name}")
    checkpoint.rename(nameless)
    shutil.rmtree(nameless)


def _sync(folder: Path) -> None:
    """Puts the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
