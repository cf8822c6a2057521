"""The tensors of a checkpoint, through `torch.distributed.checkpoint`: each rank writes its own, and reads by name what
it needs.

A checksum of every tensor is kept beside them and compared when it is read: torch does not notice a flipped bit.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from autopipe.checkpoint.faults import DAMAGED, named, system_error
from autopipe.checkpoint.folders import META, METADATA, read_meta
from autopipe.checkpoint.readers import Stored, as_bytes
from autopipe.checkpoint.unpickling import SafeUnpickler
from autopipe.errors import CheckpointError

MODEL, OPTIMIZER, RNG = "model.", "optimizer.", "rng"
"""Prefixes of the keys of tensors: of the model, by its names; of the optimizer, `optimizer.PARAMETER.STATE`;
random state."""


def write_tensors(folder: Path, tensors: Mapping[str, Tensor | Stored], group: Any) -> dict[str, int]:
    """Writes the tensors of this rank, reading those that lie elsewhere one at a time; returns their checksums.

    Collective over the group, a CPU one; None with one process.
    """
    planner = _LazyPlanner(tensors)
    shapes = {
        key: t if isinstance(t, Tensor) else torch.empty(t.shape, dtype=t.dtype, device="meta")
        for key, t in tensors.items()
    }
    dcp.save(
        shapes,
        storage_writer=_Writer(folder, sync_files=True),
        planner=planner,
        process_group=group,
        no_dist=group is None,
    )
    return planner.checksums


class _Writer(dcp.FileSystemWriter):
    """Raises what the operating system said, which is lost on the way to the other ranks otherwise."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        """Writes this rank's tensors."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            hidden = system_error(error)
            if hidden is None or hidden is error:
                raise
            raise OSError(hidden.errno, hidden.strerror, hidden.filename) from error


class _LazyPlanner(dcp.DefaultSavePlanner):
    """Gives a tensor when it is about to be written, and sums what it gives."""

    def __init__(self, tensors: Mapping[str, Tensor | Stored]) -> None:
        super().__init__()
        self._tensors = tensors
        self.checksums: dict[str, int] = {}

    def lookup_object(self, index: Any) -> Tensor:
        """The tensor of a key."""
        found = self._tensors[index.fqn]
        value = found if isinstance(found, Tensor) else found.read()
        self.checksums[index.fqn] = checksum(value)
        return value


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the dtype, shape and bytes of a tensor."""
    whole, start = tensor.detach().to("cpu").contiguous(), zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return zlib.crc32(as_bytes(whole).numpy().data, start) if whole.numel() else start


def expect_one_process() -> None:
    """torch warns where it saves or loads without a process group, which is meant here. (Filters are not safe to change
    in a thread.)"""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Reader:
    """A checkpoint that is read from: tensors by key.

    Attributes:
        stored: shape and dtype of every tensor.
        meta: all that is no tensor.
        names: every name of the model's state dict, to the name of its tensor.
        seed: of the run's random operations; None: not known.
        progress: the number of steps, and what the user has saved beside them.

    Raises:
        CheckpointError: it is damaged, foreign, or would run code.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint, self.meta = checkpoint, read_meta(checkpoint)
        self._reader = _SafeReader(checkpoint)
        self.stored: dict[str, tuple[torch.Size, torch.dtype]] = named(
            lambda: {
                name: (torch.Size(item.size), item.properties.dtype)
                for name, item in self._reader.read_metadata().state_dict_metadata.items()
                if isinstance(item, TensorStorageMetadata)
            },
            checkpoint / METADATA,
        )
        self._checksums: dict[str, int] = self._field("checksums", dict)
        self.names: dict[str, str] = self._field("names", dict)
        if self.stored.keys() != self._checksums.keys():
            raise CheckpointError(
                f"tensors {sorted(self.stored.keys() ^ self._checksums.keys())[:3]} in only one of {METADATA} and "
                f"{META}",
                expected="the same tensors in both",
                where=str(checkpoint),
                remedy=DAMAGED,
            )
        seed = self._field("seed", (int, type(None)))
        client = self._field("client_state", dict)
        self.seed: int | None = seed
        self.progress: tuple[int, Any] = named(
            lambda: (int(client["steps"]), client["client"]), checkpoint / META, DAMAGED
        )

    def _field(self, name: str, kind: Any) -> Any:
        value = self.meta.get(name)
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{name} = {value!r:.60}", expected=f"{kind}", where=str(self.checkpoint / META), remedy=DAMAGED
            )
        return value

    def key_of(self, aliases: Sequence[str]) -> str:
        """The key of a tensor of the model that has these names; weights from elsewhere may have been saved under any
        of them."""
        name = next((self.names[n] for n in aliases if n in self.names), aliases[0])
        return f"{MODEL}{name}"

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills the given tensors by key. Not collective: each rank reads what it needs.

        Raises:
            CheckpointError: a tensor is missing or has another shape, or is damaged.
        """
        for key, tensor in tensors.items():
            there = self.stored.get(key)
            if there is None or there[0] != tensor.shape:
                raise CheckpointError(
                    f"no tensor {key!r}" if there is None else f"{key!r} of shape {tuple(there[0])}",
                    expected="the tensors of this model" if there is None else f"{tuple(tensor.shape)}",
                    where=str(self.checkpoint),
                    remedy="load a checkpoint of the same model",
                )
        expect_one_process()
        state = dict(tensors)
        named(lambda: dcp.load(state, storage_reader=self._reader, no_dist=True), self.checkpoint)
        for key, tensor in tensors.items():
            if tensor.dtype == self.stored[key][1] and checksum(tensor) != self._checksums.get(key):
                raise CheckpointError(
                    f"other bytes in {key!r} than were written",
                    expected="the checksum that was written with it",
                    where=str(self.checkpoint),
                    remedy="load an earlier checkpoint: pass its step-… folder",
                )

    def read(self, key: str) -> Tensor:
        """A tensor by its key, on the CPU."""
        shape, dtype = self.stored[key]
        value = torch.empty(shape, dtype=dtype)
        self.read_into({key: value})
        return value


class _SafeReader(dcp.FileSystemReader):
    """Reads `.metadata` once, with an allow-list of names, and checks where it points."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's own description of its tensors."""
        if not hasattr(self, "_metadata"):
            with open(Path(self.path) / METADATA, "rb") as file:
                found = SafeUnpickler(file).load()
            _check(found, Path(self.path))
            self._metadata = found
        if getattr(self._metadata, "storage_meta", None) is None:
            self._metadata.storage_meta = dcp.metadata.StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        checked: Metadata = self._metadata
        return checked


def _check(metadata: Any, folder: Path) -> None:
    """The files are inside of the checkpoint, and no tensor is larger than they are together.

    Raises:
        CheckpointError: they are not.
    """
    root, present = folder.resolve(), 0
    for path in {info.relative_path for info in metadata.storage_data.values()}:
        if not (root / path).resolve().is_relative_to(root):
            raise CheckpointError(
                f"a path {path!r} that leaves the checkpoint",
                expected="files of the checkpoint alone",
                where=str(root),
                remedy="do not trust this checkpoint",
            )
        present += (root / path).stat().st_size
    for name, item in metadata.state_dict_metadata.items():
        if isinstance(item, TensorStorageMetadata) and item.size.numel() * item.properties.dtype.itemsize > present:
            raise CheckpointError(
                f"a tensor {name!r} of shape {tuple(item.size)} in files of {present} bytes",
                expected="tensors no larger than their files",
                where=str(root),
                remedy=DAMAGED,
            )
