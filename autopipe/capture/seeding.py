"""Random operations that do not depend on where they run: each node that draws is preceded by one that seeds, from
step, micro-batch and node."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from profiler import accelerator

SOURCE = "_autopipe_random"
_MIX, _MASK = 0x9E3779B97F4A7C15, (1 << 63) - 1


class RandomSource:
    """Seeds the generators for a node; `set` says for which run, step and micro-batch.

    Two nodes, steps or micro-batches have different seeds; the number of stages and replicas does not enter.
    """

    def __init__(self) -> None:
        self._place: tuple[int, int, int] | None = None

    def set(self, seed: int, step: int, microbatch: int) -> None:
        """The micro-batch that is run from now on, forward or backward (a checkpoint region is computed again in the
        backward)."""
        self._place = seed, step, microbatch

    def seed(self, node: int) -> None:
        """Seeds torch's generators for one node; does nothing before the first `set`."""
        if self._place is None:
            return
        run, step, microbatch = self._place
        seed = _mixed(_mixed(_mixed(_mixed(run) + step) + microbatch) + node)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed is a hundred times slower, for every device
        accelerator.seed_current(seed)


def _mixed(value: int) -> int:
    """A step of a Weyl sequence and a finaliser (splitmix64; Steele, Lea, Flood 2014)."""
    z = (value + 1) * _MIX & (1 << 64) - 1
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    z = (z ^ z >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return (z ^ z >> 31) & _MASK


def seed_node(source: RandomSource, node: int) -> None:
    """The function that a seeding node calls."""
    source.seed(node)


def add_seeds(graph: fx.Graph) -> bool:
    """Puts a seeding node before every node that draws random numbers; true where there is any.

    The graph then reads the attribute `SOURCE` of its module, a `RandomSource`.
    """
    drawing = [n for n in graph.nodes if n.meta.get("random")]
    for node in drawing:
        with graph.inserting_before(node):
            source: Any = graph.create_node("get_attr", SOURCE)
            seeding = graph.call_function(seed_node, (source, zlib.crc32(node.name.encode())))
        seeding.meta = {k: node.meta[k] for k in ("region", "checkpoint", "nn_module_stack") if k in node.meta}
        seeding.meta["effect"] = True
    return bool(drawing)


@contextmanager
def generators_kept() -> Iterator[None]:
    """The user's random state is as it was when the context ends."""
    here = accelerator.current_device()
    with accelerator.fork_rng([] if here is None else [here]):
        yield
