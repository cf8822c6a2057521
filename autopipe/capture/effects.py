"""Effects of a recorded node beyond its value: storages that it touches and writes, random numbers that it
draws.

From the writes follow the groups of nodes that must stay on one stage and in order: a tensor that is written in place,
its views, and whoever reads them before the last write, or afterwards through a name that is older than the write. A
node whose value is a tuple stays with those that take it apart, so that only tensors cross between stages; a tensor
whose shape depends on values stays with its readers, so that those that cross have the shapes that were planned.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from autopipe.capture.compat import storage_key
from autopipe.capture.objects import tensors_inside


def tensors_in(*values: Any) -> list[Tensor]:
    """Every tensor in nested containers, and in objects that hold tensors."""
    return tensors_inside(values)


class RandomWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices operators that draw random numbers, whose shape depends on values, or by which Python reads a value."""

    drawn = shaped_by_values = read = False

    def clear(self) -> None:
        """Forgets what has run."""
        self.drawn = self.shaped_by_values = self.read = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn = True
        if torch.Tag.dynamic_output_shape in func.tags and not _indexes_by_numbers(func, args):
            self.shaped_by_values = True
        if torch.Tag.data_dependent_output in func.tags:
            self.read = True
        return func(*args, **(kwargs or {}))


def _indexes_by_numbers(func: Any, args: Any) -> bool:
    """Whether an indexing has no boolean mask among its indices: then its shape follows from theirs."""
    masks = (torch.bool, torch.uint8)
    return func is torch.ops.aten.index.Tensor and all(i is None or i.dtype not in masks for i in args[1])


class Effects:
    """Collects the effects of nodes as they run; `finish` writes `meta["writes"]`, `meta["random"]` and
    `meta["group"]`.

    The tensors seen are kept alive, so that the key of a storage stays its own.
    """

    def __init__(self) -> None:
        self._alive: list[Tensor] = []
        self._touched: dict[int, list[fx.Node]] = defaultdict(list)
        self._writers: dict[int, list[fx.Node]] = defaultdict(list)
        self._together: list[list[fx.Node]] = []

    def keep_together(self, nodes: Iterable[fx.Node]) -> None:
        """These nodes must not be separated, for a reason of their own."""
        self._together.append(list(nodes))

    def before(self, tensors: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
        """The versions of the tensors that a node is about to read."""
        return [(t, t._version) for t in tensors if not t.is_inference()]

    def after(self, node: fx.Node, seen: list[tuple[Tensor, int]], out: Any, hidden: Iterable[Tensor] = ()) -> None:
        """Notes which storages the node has touched, and which it wrote; `hidden`: written without a new version."""
        outs = tensors_in(out)
        self._alive += [t for t, _ in seen]
        self._alive += outs
        for key in {storage_key(t) for t in [*(t for t, _ in seen), *outs]} - {None}:
            self._touched[key].append(node)  # type: ignore[index]
        written = [t for t, version in seen if t._version != version] + list(hidden)
        for key in {storage_key(t) for t in written} - {None}:
            self._writers[key].append(node)  # type: ignore[index]
            node.meta["writes"] = True

    def finish(self, graph: fx.Graph) -> None:
        """Gives a group name to nodes that must not be separated."""
        order = {n: i for i, n in enumerate(graph.nodes)}
        parent: dict[fx.Node, fx.Node] = {}

        def find(n: fx.Node) -> fx.Node:
            while parent.setdefault(n, n) is not n:
                n = parent[n]
            return n

        together = [self._members(key, writers, order) for key, writers in self._writers.items()]
        together += [[n, *n.users] for n in order if n.op.startswith("call") and _is_compound(n.meta.get("val"))]
        together += [[n, *n.users] for n in order if n.meta.get("varying")]
        together += [[n for n in nodes if n in order] for nodes in self._together]
        together += [_differentiated(n) for n in order if n.target is torch.autograd.grad]
        for members in together:
            members = [n for n in members if n.op not in ("placeholder", "get_attr", "output")]
            for n in members[1:]:
                a, b = sorted((find(members[0]), find(n)), key=lambda m: order[m])
                parent[b] = a
        sizes: dict[fx.Node, int] = defaultdict(int)
        for n in parent:
            sizes[find(n)] += 1
        for n in parent:
            if sizes[find(n)] > 1:
                n.meta["group"] = find(n).name

    def _members(self, key: int, writers: list[fx.Node], order: dict[fx.Node, int]) -> list[fx.Node]:
        """The nodes that must stay with the writes to one storage."""
        touched = [n for n in self._touched[key] if n in order]
        aliases = set(touched)
        last = max((order[n] for n in writers if n in order), default=-1)
        names_after = {n for n in writers if order.get(n, -1) == last}
        stale = aliases - names_after
        members = []
        for n in touched:
            after_through_new_name = order[n] > last and not any(
                i in stale and order[i] <= last for i in _alias_inputs(n, key)
            )
            if not after_through_new_name:
                members.append(n)
        return [n for n in members if n.op not in ("placeholder", "get_attr", "output")]


def _is_compound(value: Any) -> bool:
    """Whether a node's value is a container or an object of tensors, which does not cross between stages."""
    return not isinstance(value, Tensor) and bool(tensors_in(value))


def _differentiated(node: fx.Node) -> list[fx.Node]:
    """The nodes between the outputs and inputs of a `torch.autograd.grad` inside forward: a cut would break its
    graph."""
    roots: list[fx.Node] = []
    fx.map_arg(node.args[:1], roots.append)
    above, waiting = set(roots), list(roots)
    while waiting:
        for value in waiting.pop().all_input_nodes:
            if value not in above:
                above.add(value)
                waiting.append(value)
    below: set[fx.Node] = set()
    waiting = [n for n in node.all_input_nodes if n not in roots]
    while waiting:
        for user in waiting.pop().users:
            if user in above and user not in below:
                below.add(user)
                waiting.append(user)
    return [*below, *roots, node]


def _alias_inputs(node: fx.Node, key: int) -> list[fx.Node]:
    """The inputs of a node whose value may lie in the storage."""
    return [i for i in node.all_input_nodes if key in {storage_key(t) for t in tensors_in(i.meta.get("val"))}]


def remove_dead_code(graph: fx.Graph) -> None:
    """Removes nodes that nobody reads; those marked with an effect stay. The graph must hold no mode switches."""
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or bool(n.meta.get("effect")))


def hidden_writes(target: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that a call writes without counting up their version: the running statistics of functional norms."""
    if target in (F.batch_norm, F.instance_norm):
        names = ("input", "running_mean", "running_var", "weight", "bias", "training")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        updates = given.get("training", False) if target is F.batch_norm else given.get("use_input_stats", True)
        return [given[n] for n in names[1:3] if updates and given.get(n) is not None]
    return []


def python_random() -> tuple[Any, ...]:
    """The states of the generators of Python and numpy, as far as every draw changes them."""
    state = np.random.get_state()
    return random.getstate()[1][-1], random.getstate()[1][0], state[2], int(state[1][0]), state[3]  # type: ignore[index]
