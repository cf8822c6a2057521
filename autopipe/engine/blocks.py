"""Blocks of memory that two processes have mapped, and how the tensors of a message lie in one."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

_ALIGNED = 64
MAX_PACKINGS = 64
"""Packings of which a block keeps the views."""


class Packing:
    """How the tensors of a message lie in a block. Made once for all messages of a kind: blocks know it by its identity.

    Args:
        tensors: shape, strides and dtype of each; dense.

    Attributes:
        size: bytes that they take, every tensor from a multiple of 64 on.
    """

    def __init__(self, tensors: Sequence[tuple[Sequence[int], Sequence[int], torch.dtype]]) -> None:
        self._tensors = tensors
        self.size = sum(_room(shape, dtype) for shape, _, dtype in tensors)

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raises ValueError where tensors are not of these shapes and dtypes."""
        for tensor, (shape, _, dtype) in zip(tensors, self._tensors, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype:
                got = f"a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}"
                raise ValueError(f"{got} where one of {tuple(shape)} and {dtype} is due")

    def views(self, block: Tensor) -> list[Tensor]:
        """The tensors on a block's bytes."""
        views, offset = [], 0
        for shape, stride, dtype in self._tensors:
            end = offset + math.prod(shape) * dtype.itemsize
            views.append(block[offset:end].view(dtype).as_strided(shape, stride, offset // dtype.itemsize))
            offset += _room(shape, dtype)
        return views


@dataclass(slots=True)
class Block:
    """Memory that two processes have mapped, `bytes`."""

    bytes: Tensor
    _views: dict[Packing, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of_file(cls, fd: int) -> Self:
        """The bytes of a file in memory, mapped; the descriptor is closed."""
        try:
            return cls(torch.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), dtype=torch.uint8))
        finally:
            os.close(fd)

    def views(self, packing: Packing) -> list[Tensor]:
        """The tensors of a message in this block; the same objects each time."""
        views = self._views.get(packing)
        if views is None:
            if len(self._views) == MAX_PACKINGS:
                self._views.clear()
            views = self._views[packing] = packing.views(self.bytes)
        return views


def copies(views: Sequence[Tensor]) -> list[Tensor]:
    """What a receiver makes of a message's tensors, which are the sender's again afterwards."""
    return [view.clone() for view in views]


def _room(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes of a block that a tensor takes."""
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED
