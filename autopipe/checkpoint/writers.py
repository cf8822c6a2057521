"""Stored tensors go in; a safetensors file, several with an index, or a torch file comes out, written tensor by tensor.

No more than one tensor is in memory at a time. A file is written beside its name, which it gets when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autopipe.checkpoint.faults import fault, named
from autopipe.checkpoint.readers import DTYPES, Stored, as_bytes
from autopipe.errors import CheckpointError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def num_bytes(tensor: Stored) -> int:
    """The size of a tensor."""
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def write_safetensors(file: Path, tensors: Mapping[str, Stored]) -> None:
    """Writes one safetensors file; a tensor that has several names is written under each, as the format wants it.

    Raises:
        CheckpointError: the file is there already, cannot be written, or a dtype has no name in the format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise CheckpointError(
                f"tensor {name!r} of {tensor.dtype}",
                expected=f"one of {', '.join(_NAMES.values())}",
                where=str(file),
                remedy="write a torch file: name it *.pt",
            )
        begin, end = end, end + num_bytes(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with _written(file) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            _write(out, tensor)


def write_sharded(folder: Path, tensors: Mapping[str, Stored], max_shard_bytes: int) -> list[Path]:
    """Writes `model.safetensors`, or, where it would be larger, shards with `model.safetensors.index.json`, as
    transformers reads them.

    Raises:
        CheckpointError: as `write_safetensors`.
    """
    shards: list[dict[str, Stored]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + num_bytes(tensor) > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += num_bytes(tensor)
    named(lambda: folder.mkdir(parents=True, exist_ok=True), folder)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0])
        return [folder / "model.safetensors"]
    files = [folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(file, shard)
    weight_map = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(map(num_bytes, tensors.values()))}, "weight_map": weight_map}
    with _written(folder / "model.safetensors.index.json") as out:
        out.write(json.dumps(index, indent=2).encode())
    return [*files, folder / "model.safetensors.index.json"]


def write_torch(file: Path, tensors: Mapping[str, Stored]) -> None:
    """Writes what `torch.save` of the state dict writes; a tensor that has several names is written once.

    torch writes the file with room for the values and tells where each tensor's are.

    Raises:
        CheckpointError: the file is there already, or cannot be written.
    """
    with FakeTensorMode():
        shared = {t: torch.empty(t.shape, dtype=t.dtype) for t in dict.fromkeys(tensors.values())}
    with _written(file) as out:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({name: shared[t] for name, t in tensors.items()}, out)
        out.seek(0)
        with FakeTensorMode():
            placed = torch.load(out, weights_only=True)
        offsets = {t: placed[name].untyped_storage()._checkpoint_offset for name, t in tensors.items()}
        for tensor, offset in offsets.items():
            out.seek(offset)
            _write(out, tensor)


@contextlib.contextmanager
def _written(file: Path) -> Iterator[IO[bytes]]:
    """A new file to write to, which gets its name at the end; nothing is left of it where the context fails."""
    if file.exists():
        raise CheckpointError(
            f"{str(file)!r}, which is there already",
            expected="a new file",
            where=str(file),
            remedy="name another file, or remove this one",
        )
    aside = file.with_name(f".writing-{file.name}")
    try:
        with open(aside, "w+b") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        aside.rename(file)
    except BaseException as cause:
        aside.unlink(missing_ok=True)
        if isinstance(cause, OSError):
            raise fault(file, cause) from cause
        raise


def _write(out: IO[bytes], tensor: Stored) -> None:
    value = tensor.read()
    if value.numel():
        out.write(as_bytes(value).numpy().data)
