"""Blocks of memory that two processes have mapped, and how the tensors of a message lie in one."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_ALIGNED = 64


class MessageLayout:
    """Layout of a message's tensors in a block.

    Args:
        tensors: shape, strides and dtype of each; dense.
        repeated: such messages come in every step, so that a block keeps its views of them.

    Attributes:
        size: bytes that they take, every tensor from a multiple of 64 on.
    """

    def __init__(
        self, tensors: Sequence[tuple[Sequence[int], Sequence[int], torch.dtype]], *, repeated: bool = False
    ) -> None:
        self.repeated = repeated
        self._places: list[tuple[Sequence[int], Sequence[int], torch.dtype, int, int]] = []
        self._due = [(torch.Size(shape), dtype) for shape, _, dtype in tensors]
        self.size = 0
        for shape, stride, dtype in tensors:
            count = math.prod(shape)
            self._places.append((shape, stride, dtype, count, self.size))
            self.size += -(-count * dtype.itemsize // _ALIGNED) * _ALIGNED

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raises ValueError where tensors are not of these shapes and dtypes."""
        if [(t.shape, t.dtype) for t in tensors] == self._due:
            return
        for tensor, (shape, dtype) in zip(tensors, self._due, strict=True):
            if (tensor.shape, tensor.dtype) != (shape, dtype):
                got = f"a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}"
                raise ValueError(f"{got} where one of {tuple(shape)} and {dtype} is due")

    def views(self, memory: mmap.mmap) -> list[Tensor]:
        """The tensors on a block's memory."""
        return [
            torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).as_strided(shape, stride)
            if count
            else torch.empty(shape, dtype=dtype)
            for shape, stride, dtype, count, offset in self._places
        ]


@dataclass(slots=True, eq=False)
class Block:
    """Memory that two processes have mapped, of `size` bytes."""

    memory: mmap.mmap
    size: int
    _packing: MessageLayout | None = None
    _views: Sequence[Tensor] = ()

    @classmethod
    def of_file(cls, fd: int) -> Self:
        """A file in memory, mapped; the descriptor is closed."""
        try:
            size = os.fstat(fd).st_size
            return cls(mmap.mmap(fd, size), size)
        finally:
            os.close(fd)

    def views(self, layout: MessageLayout) -> Sequence[Tensor]:
        """The tensors of a message on this memory; those of the last repeated one are kept, since between computes,
        when nothing of it is in the processor's cache, making a view takes as long as the copy."""
        if layout is self._packing:
            return self._views
        views = layout.views(self.memory)
        if layout.repeated:
            self._packing, self._views = layout, views
        return views


def copies(views: Sequence[Tensor]) -> list[Tensor]:
    """Copies of a message's tensors, which belong to the sender again afterwards."""
    return [view.clone() for view in views]
