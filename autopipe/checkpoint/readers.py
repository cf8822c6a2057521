"""A safetensors or torch file goes in; where each of its tensors lies comes out, so that single tensors can be read and
no code is run.

Both formats hold tensors as plain bytes, so that one is read straight into its own memory: the file is never mapped or
loaded whole. A safetensors file is `<u64 length> <JSON header> <bytes>`
(https://github.com/huggingface/safetensors#format); where the storages of a torch file lie is what `torch.load` tells
under a fake mode.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autopipe.checkpoint.faults import DAMAGED, named
from autopipe.errors import CheckpointError

SAFETENSORS, TORCH = (".safetensors",), (".pt", ".pth", ".bin", ".ckpt")
MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class Stored(Protocol):
    """A tensor that is stored somewhere."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""

    def read(self) -> Tensor:
        """The tensor, on the CPU, in memory of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A tensor in a file: its first element at `offset` bytes, the others by `stride` (in elements)."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """From the first to the last element."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Reads the bytes of this tensor alone."""
        flat = torch.empty(self.num_bytes // self.dtype.itemsize, dtype=self.dtype)
        if flat.numel():
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                got = file.readinto(as_bytes(flat).numpy().data)
            if got != self.num_bytes:
                raise _damaged(self.file, f"a tensor of {self.num_bytes} bytes of which {got} are there")
        return flat.as_strided(self.shape, self.stride).contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A tensor that had to be loaded, from a torch file of before torch 1.6."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.value.dtype

    def read(self) -> Tensor:
        """A copy."""
        return self.value.detach().clone().contiguous()


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, sharing its memory."""
    return tensor.reshape(-1).view(torch.uint8)


def tensors_of(file: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors or torch file, by name.

    Raises:
        CheckpointError: the file cannot be read, is damaged, is of another kind, or would run code.
    """
    read = _of_safetensors if file.suffix in SAFETENSORS else _of_torch
    return named(lambda: dict(read(file)), file, DAMAGED)


def _of_safetensors(file: Path) -> Iterator[tuple[str, Stored]]:
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(file, f"a header of {length} bytes in a file of {size}")
        header = json.loads(opened.read(length))
    if not isinstance(header, dict):
        raise _damaged(file, f"a header that is a {type(header).__name__}")
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, _safetensors_entry(file, name, entry, 8 + length, size)


def _safetensors_entry(file: Path, name: str, entry: Any, begin: int, size: int) -> Span:
    shape, offsets = entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets]
    if entry["dtype"] not in DTYPES:
        raise _damaged(file, f"tensor {name!r} of dtype {entry['dtype']!r}")
    dtype = DTYPES[entry["dtype"]]
    if not all(type(n) is int and n >= 0 for n in numbers) or len(offsets) != 2:
        raise _damaged(file, f"tensor {name!r} of shape {shape} at {offsets}")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize or begin + offsets[1] > size:
        raise _damaged(file, f"tensor {name!r} of shape {shape} and dtype {entry['dtype']} in bytes {offsets}")
    return Span(file=file, offset=begin + offsets[0], shape=tuple(shape), stride=_dense(shape), dtype=dtype)


def _of_torch(file: Path) -> Iterator[tuple[str, Stored]]:
    zipped = zipfile.is_zipfile(file)
    if zipped:
        _check_zip(file)
        with FakeTensorMode():
            state = torch.load(file, map_location="cpu", weights_only=True)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        inside = sorted({type(v).__name__ for v in state.values()}) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"a file that holds {inside}",
            expected="a dict of tensors by the model's names",
            where=str(file),
            remedy="save the model's state_dict() by itself",
        )
    size = file.stat().st_size
    for name, value in state.items():
        if value.layout is not torch.strided or value.is_quantized:
            raise _damaged(file, f"tensor {name!r} of layout {value.layout}")
        yield str(name), _torch_span(file, str(name), value, size) if zipped else Loaded(value)


def _torch_span(file: Path, name: str, value: Tensor, size: int) -> Span:
    begin: Any = value.untyped_storage()._checkpoint_offset
    span = Span(
        file=file,
        offset=(begin or 0) + int(value.storage_offset()) * value.dtype.itemsize,
        shape=tuple(value.shape),
        stride=tuple(value.stride()),
        dtype=value.dtype,
    )
    if span.num_bytes and (begin is None or span.offset + span.num_bytes > size):
        raise _damaged(file, f"tensor {name!r} of {span.num_bytes} bytes at {begin} in a file of {size}")
    return span


def _check_zip(file: Path) -> None:
    """Raise unless a record is stored uncompressed and in this machine's byte order."""
    with zipfile.ZipFile(file) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise _damaged(file, "a compressed torch file")
        order = [n for n in archive.namelist() if n.endswith("/byteorder")]
        if order and archive.read(order[0]) != b"little":
            raise _damaged(file, "a torch file of a big-endian machine")


def _dense(shape: list[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _damaged(file: Path, got: str) -> CheckpointError:
    return CheckpointError(got, expected="a whole safetensors or torch file", where=str(file), remedy=DAMAGED)
