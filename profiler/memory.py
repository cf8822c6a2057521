"""Memory of one node: which storages it makes and keeps for backward, and the most it holds while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import record_function

from profiler import accelerator
from profiler.values import storages_of

_SPLIT = "autopipe: the next part"


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
    """Allocations of a block.

    Attributes:
        parts: for each part of the block (see `split`) the level at its start and the highest in it, in bytes above the
            start of the block; known when the block is left.
        split: ends a part and begins the next.
    """

    parts: list[tuple[int, int]] = field(default_factory=list)
    split: Callable[[], None] = lambda: None

    @property
    def num_bytes(self) -> int:
        """The most bytes allocated at once in the block, beyond those allocated at its start."""
        return max((top for _, top in self.parts), default=0)

    def within(self, part: int) -> int:
        """The same of one part, beyond those allocated at the part's start."""
        start, top = self.parts[part] if self.parts else (0, 0)
        return top - start


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measures the allocations of a block.

    On an accelerator by the caching allocator's counter. On a CPU by the allocator's own events, which hold the
    workspace inside an operator as well as its outputs; memory that oneDNN or MKL takes by themselves is not seen.

    On a CPU, drop what the block has made inside of it: torch keeps the addresses of blocks that outlive it, and a
    later measurement would count the release of whatever lies there then.
    """
    peak = Peak()
    counted = _counted_by_allocator(device, peak) if accelerator.is_accelerator(device) else _counted_on_cpu(peak)
    with counted:
        yield peak


@contextmanager
def _counted_by_allocator(device: torch.device, peak: Peak) -> Iterator[None]:
    before = start = accelerator.allocated_bytes(device)
    accelerator.reset_peak(device)

    def split() -> None:
        nonlocal start
        peak.parts.append((start - before, accelerator.peak_bytes(device) - before))
        start = accelerator.allocated_bytes(device)
        accelerator.reset_peak(device)

    peak.split = split
    yield
    split()


@contextmanager
def _counted_on_cpu(peak: Peak) -> Iterator[None]:
    """By the thread-local profiler rather than Kineto: it starts in microseconds and writes nothing to stderr."""

    def split() -> None:
        with record_function(_SPLIT):
            pass

    peak.split = split
    kind = torch.autograd.ProfilerState.CPU
    config = torch.autograd.ProfilerConfig(
        kind, False, True, False, False, False, torch._C._profiler._ExperimentalConfig()
    )
    torch.autograd._enable_profiler_legacy(config)
    try:
        yield
    finally:
        threads = torch.autograd._disable_profiler_legacy()
        level = start = top = 0
        for event in (e for thread in threads for e in thread):
            if str(event.kind()) == "memory_alloc":
                level += event.cpu_memory_usage()
                top = max(top, level)
            elif str(event.kind()) == "push" and event.name() == _SPLIT:
                peak.parts.append((start, top))
                start = top = level
        peak.parts.append((start, top))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nested value."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return [t for t in leaves if isinstance(t, Tensor)]


def new_storages(outputs: Sequence[Tensor], known: Callable[[int], bool]) -> list[torch.UntypedStorage]:
    """Storages of the outputs that are not among the known ones, each once."""
    found = {s._cdata: s for t in outputs for s in storages_of(t) if not known(s._cdata)}
    return list(found.values())
