"""The weights of a model on disk, whoever wrote them, go in; a mapping from names to tensors comes out that reads one
when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autopipe.checkpoint.faults import DAMAGED, named
from autopipe.checkpoint.folders import META, PREFIX, newest
from autopipe.checkpoint.readers import SAFETENSORS, TORCH, Stored, tensors_of
from autopipe.checkpoint.tensors import MODEL, Reader
from autopipe.errors import CheckpointError


class Weights(Mapping[str, Tensor]):
    """Tensors by name; each is read anew, into memory of its own, when it is asked for."""

    def __init__(self, tensors: Mapping[str, Stored], where: Path) -> None:
        self.stored, self.where = dict(tensors), where

    def __getitem__(self, name: str) -> Tensor:
        return named(self.stored[name].read, self.where, DAMAGED)

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def open_weights(path: str | Path) -> Weights:
    """The weights in a file or folder.

    Args:
        path: a safetensors or torch file; the index of several (`*.index.json`); a folder that holds either; or a
            checkpoint of autopipe. No tensor is read before it is asked for, and no code is run.

    Raises:
        CheckpointError: there are none, or a file is damaged.
    """
    place = Path(path)
    if is_checkpoint(place):
        return _of_checkpoint(newest(place))
    if place.is_dir():
        place = _file_in(place)
    if not place.is_file():
        raise CheckpointError(
            f"no file {str(place)!r}",
            expected="a safetensors or torch file, its index, or a folder that holds one",
            where="weights",
            remedy="pass the path of the weights",
        )
    return Weights(_of_index(place) if place.suffix == ".json" else tensors_of(place), place)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, or holds some."""
    return (path / META).is_file() or any(path.glob(f"{PREFIX}*"))


def _file_in(folder: Path) -> Path:
    """The index of a folder, else its only weights file; safetensors before torch files."""
    for suffixes in (SAFETENSORS, TORCH):
        indices = [p for s in suffixes for p in sorted(folder.glob(f"*{s}.index.json"))]
        files = indices or [p for s in suffixes for p in sorted(folder.glob(f"*{s}"))]
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(
                f"{len(files)} weights files: {', '.join(p.name for p in files[:3])}",
                expected="one file, or one index",
                where=str(folder),
                remedy="pass the path of the file that you mean",
            )
    raise CheckpointError(
        "a folder without weights",
        expected=f"*.safetensors, {', '.join('*' + s for s in TORCH)}, an index, or a checkpoint",
        where=str(folder),
        remedy="pass the folder that holds the weights",
    )


def _of_index(index: Path) -> dict[str, Stored]:
    """The tensors of all files of an index (`weight_map`: the file of each name), which lie in its own folder."""

    def read() -> dict[str, str]:
        files = json.loads(index.read_text())["weight_map"]
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise ValueError("weight_map is no mapping from tensor names to file names")
        return files

    weight_map = named(read, index, DAMAGED)
    tensors: dict[str, Stored] = {}
    for file in dict.fromkeys(weight_map.values()):
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"a file {file!r} outside of the folder",
                expected="a file beside the index",
                where=str(index),
                remedy="do not trust this index",
            )
        tensors |= {n: t for n, t in tensors_of(index.parent / file).items() if weight_map.get(n) == file}
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise CheckpointError(
            f"no tensor {missing[0]!r} in {weight_map[missing[0]]!r} ({len(missing)} missing)",
            expected="what the index says",
            where=str(index),
            remedy=DAMAGED,
        )
    return tensors


@dataclass(frozen=True, slots=True)
class _InCheckpoint:
    reader: Reader
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.reader.stored[self.key][0])

    @property
    def dtype(self) -> torch.dtype:
        return self.reader.stored[self.key][1]

    def read(self) -> Tensor:
        return self.reader.read(self.key)


def _of_checkpoint(checkpoint: Path) -> Weights:
    """The model's tensors in a checkpoint, under every name that the model's state dict has for them."""
    reader = Reader(checkpoint)
    tensors: dict[str, Stored] = {}
    for name, first in reader.names.items():
        if f"{MODEL}{first}" not in reader.stored:
            raise CheckpointError(
                f"no tensor {first!r}", expected="every tensor of the model", where=str(checkpoint), remedy=DAMAGED
            )
        tensors[name] = _InCheckpoint(reader, f"{MODEL}{first}")
    return Weights(tensors, checkpoint)
