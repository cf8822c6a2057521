"""Checkpoints on disk: tensors by name through `torch.distributed.checkpoint`, all else as JSON, each checkpoint whole or not there.

    DIRECTORY/step-00000120/meta.json     step, plan, optimizer options, scheduler, loss scale, seed, the user's own state
    DIRECTORY/step-00000120/.metadata     which tensor lies where
    DIRECTORY/step-00000120/*.distcp      the tensors

It is written beside (`.writing-…`) and published by one rename. Nothing that is read can run code: `.metadata` is unpickled with
an allow-list, tensors with `weights_only`.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from autopipe.errors import CheckpointError

SCHEMA = "autopipe.checkpoint/1"
META = "meta.json"
_PREFIX, _WRITING = "step-", ".writing-"
_ALLOWED = {
    "torch": {"Size", "device", "layout", "memory_format"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_rebuild_memory_format"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}
_ALLOWED_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")


def newest(directory: str | Path) -> Path:
    """The newest whole checkpoint in a directory, or the directory itself where it is one.

    Raises:
        CheckpointError: there is none.
    """
    root = Path(directory)
    if (root / META).is_file():
        return root
    whole = [p for p in root.glob(f"{_PREFIX}*") if (p / META).is_file() and (p / ".metadata").is_file()]
    if not whole:
        raise CheckpointError(
            f"no whole checkpoint in {str(root)!r}",
            expected=f"a folder {_PREFIX}… with {META} in it",
            remedy="pass the directory that was given to save_checkpoint()",
        )
    return max(whole, key=lambda p: p.name)


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """All of a checkpoint that is no tensor.

    Raises:
        CheckpointError: it cannot be read, or is of another schema.
    """
    try:
        meta = json.loads((checkpoint / META).read_text())
    except (OSError, ValueError, RecursionError) as cause:
        raise _unreadable(checkpoint / META, cause) from cause
    if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
        got = meta.get("schema") if isinstance(meta, dict) else type(meta).__name__
        raise CheckpointError(
            f"schema {got!r}",
            expected=repr(SCHEMA),
            where=str(checkpoint / META),
            remedy="load a checkpoint that autopipe wrote",
        )
    return meta


def write(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    coordinator: bool,
    group: Any,
    together: Callable[[Callable[[], Any]], Any],
    keep: int | None = None,
) -> Path:
    """Writes a checkpoint. Collective: every rank passes the tensors that it saves; names are unique over the ranks.

    Args:
        coordinator: this rank makes the folder, writes what is no tensor, and publishes.
        group: a process group on the CPU; None with one process.
        together: does work on every rank, and raises the first rank's error on all.
        keep: whole checkpoints to keep, this one included; None keeps all.

    Raises:
        CheckpointError: it could not be written; the last one stands.
    """
    root = Path(directory)
    final, writing = root / f"{_PREFIX}{step:08d}", root / f"{_WRITING}{_PREFIX}{step:08d}"

    def begin() -> str:
        if coordinator:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
        return json.dumps({"schema": SCHEMA, "step": step, **meta})

    def store() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(
                dict(tensors),
                storage_writer=dcp.FileSystemWriter(writing, sync_files=True),
                process_group=group,
                no_dist=group is None,
            )

    text = together(lambda: _named(begin, root))
    try:
        together(lambda: _named(store, root))
    except CheckpointError:
        if coordinator:
            shutil.rmtree(writing, ignore_errors=True)
        raise
    together(lambda: _named(lambda: _publish(text, writing, final, keep) if coordinator else None, root))
    return final


def _publish(text: str, writing: Path, final: Path, keep: int | None) -> None:
    with open(writing / META, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        replaced = final.with_name(f"{_WRITING}replaced-{final.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        writing.rename(final)
        shutil.rmtree(replaced)
    else:
        writing.rename(final)
    if keep is not None:
        whole = sorted(p for p in final.parent.glob(f"{_PREFIX}*") if (p / META).is_file())
        for old in whole[:-keep]:
            shutil.rmtree(old)


def stored(checkpoint: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name, shape and dtype of every tensor of a checkpoint."""
    metadata = _named(lambda: _SafeReader(checkpoint).read_metadata(), checkpoint)
    return {name: (item.size, item.properties.dtype) for name, item in metadata.state_dict_metadata.items()}


def read_into(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills the given tensors from a checkpoint, by name. Not collective: each rank reads what it needs.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or a file is damaged.
    """
    there = stored(checkpoint)
    for name, tensor in tensors.items():
        if name not in there:
            raise CheckpointError(
                f"no tensor {name!r}",
                expected="the tensors of this model",
                where=str(checkpoint),
                remedy="load a checkpoint of the same model",
            )
        if there[name][0] != tensor.shape:
            raise CheckpointError(
                f"{name!r} of shape {tuple(there[name][0])}",
                expected=f"{tuple(tensor.shape)}",
                where=str(checkpoint),
                remedy="load a checkpoint of the same model",
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = dict(tensors)
        _named(lambda: dcp.load(state, storage_reader=_SafeReader(checkpoint), no_dist=True), checkpoint)


class _SafeReader(dcp.FileSystemReader):
    """Reads `.metadata` with an allow-list of names instead of a plain unpickler."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _SafeUnpickler(file).load()
        root = Path(self.path).resolve()
        for info in metadata.storage_data.values():
            if not (root / info.relative_path).resolve().is_relative_to(root):
                raise CheckpointError(
                    f"a path {info.relative_path!r} that leaves the checkpoint",
                    where=str(root),
                    remedy="do not trust this checkpoint",
                )
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()) or module in _ALLOWED_MODULES:
            found = super().find_class(module, name)
            if module not in _ALLOWED_MODULES or (isinstance(found, type) and found.__module__ == module):
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def _named(work: Callable[[], Any], where: Path) -> Any:
    """Does `work`; whatever goes wrong is a CheckpointError."""
    try:
        return work()
    except CheckpointError:
        raise
    except dcp.CheckpointException as several:  # torch's own, which is no Exception: it holds one for each rank
        first = next(iter(several.failures.values()))[0]
        raise _unreadable(where, first) from first
    except Exception as cause:
        raise _unreadable(where, cause) from cause


def _unreadable(where: Path, cause: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else 'no message'}",
        where=str(where),
        remedy="check the disk and the path; the last whole checkpoint is untouched",
    )
