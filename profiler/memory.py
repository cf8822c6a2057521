"""Memory of one node: which storages it makes and keeps for backward, and the most it holds while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from profiler.values import storages_of


class SavedTensors:
    """Collects what autograd saves while a block runs, and keeps nothing afterwards.

    The graph of the whole model stays linked, but what it saved is dropped after each node: profiling holds the values
    between two nodes, not the activations of the whole model.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collects from every save in the block."""

        def pack(tensor: Tensor) -> int:
            self._tensors.append(tensor.detach())
            return len(self._tensors) - 1

        with saved_tensors_hooks(pack, self._unpack):
            yield

    def _unpack(self, index: int) -> Tensor:
        if index >= len(self._tensors):
            raise RuntimeError("the gradient of an earlier node is asked for within the forward pass")
        return self._tensors[index]

    def storages(self) -> list[torch.UntypedStorage]:
        """The storages that were saved, each once, in the order of saving."""
        found = {s._cdata: s for t in self._tensors for s in storages_of(t)}
        return list(found.values())

    def drop(self) -> None:
        """Lets the collected tensors go."""
        self._tensors.clear()


@dataclass(slots=True)
class Peak:
    """The most bytes allocated at once in a block, beyond those allocated at its start."""

    num_bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measures the allocations of a block.

    On CUDA by the caching allocator's counter. On a CPU by the allocator's own events, which hold the workspace inside an
    operator as well as its outputs; memory that oneDNN or MKL takes by themselves is not seen. Elsewhere it stays 0.
    """
    peak = Peak()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.num_bytes = max(0, torch.cuda.max_memory_allocated(device) - before)
    elif device.type == "cpu":
        events: list[int] = []
        with _allocations(events):
            yield peak
        level = 0
        for num_bytes in events:
            level += num_bytes
            peak.num_bytes = max(peak.num_bytes, level)
    else:
        yield peak


@contextmanager
def _allocations(events: list[int]) -> Iterator[None]:
    """Appends the bytes of every allocation (positive) and release (negative) on the CPU, in order.

    The thread-local profiler is used rather than Kineto: it starts in microseconds and writes nothing to stderr.
    """
    kind = torch.autograd.ProfilerState.CPU
    config = torch.autograd.ProfilerConfig(
        kind, False, True, False, False, False, torch._C._profiler._ExperimentalConfig()
    )
    torch.autograd._enable_profiler_legacy(config)
    try:
        yield
    finally:
        for thread in torch.autograd._disable_profiler_legacy():
            events.extend(e.cpu_memory_usage() for e in thread if str(e.kind()) == "memory_alloc")


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nested value."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return [t for t in leaves if isinstance(t, Tensor)]


def new_storages(outputs: Sequence[Tensor], known: Callable[[int], bool]) -> list[torch.UntypedStorage]:
    """Storages of the outputs that are not among the known ones, each once."""
    found = {s._cdata: s for t in outputs for s in storages_of(t) if not known(s._cdata)}
    return list(found.values())
