"""One node of a graph as a call: its function, and its arguments with the tensors taken out and numbered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from profiler.errors import ProfileError
from profiler.graph import module_of
from profiler.state import swapped
from profiler.values import Storage, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A node, ready to be run with any tensors of the right shapes.

    Attributes:
        node: the node.
        module: the submodule that it calls; None for functions and methods.
        spec: the structure of (args, kwargs).
        leaves: their leaves; a `Value` stands for a tensor.
        own: parameters and buffers of the submodules that it calls or is given, by their dotted paths in the model.
        model: the graph module.
    """

    node: fx.Node
    module: nn.Module | None
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    own: Mapping[str, Value]
    model: nn.Module

    @property
    def values(self) -> list[Value]:
        """The tensors among the arguments, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Value)]

    @property
    def sources(self) -> list[Storage]:
        """The distinct memory behind arguments and own tensors, in order of first appearance."""
        return list(dict.fromkeys(v.storage for v in (*self.values, *self.own.values())))

    @property
    def function(self) -> Callable[..., Any]:
        """The function that is called with the bound arguments."""
        if self.module is not None:
            return self.module
        if self.node.op == "call_method":
            name = str(self.node.target)
            return lambda owner, *args, **kwargs: getattr(owner, name)(*args, **kwargs)
        assert callable(self.node.target)
        return self.node.target

    def bind(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments with these tensors in the places of `values`."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Value) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def with_own(self, tensors: Mapping[str, Tensor]) -> Any:
        """A context in which the model holds these tensors, by their dotted paths."""
        return swapped(self.model, tensors)

    @contextmanager
    def named_failure(self, doing: str) -> Iterator[None]:
        """Turns whatever goes wrong in the block into a `ProfileError` that names the node, its module and its
        shapes."""
        try:
            yield
        except ProfileError:
            raise
        except Exception as cause:
            reason = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}"
            memory = isinstance(cause, torch.OutOfMemoryError)
            raise ProfileError(
                f"node {self.node.name!r} ({self.describe()}) failed while {doing}: {reason}",
                where=f"module {module_of(self.node) or '(the model itself)'!r}",
                remedy="profile with a smaller micro-batch or on a device with more memory"
                if memory
                else "check that the graph runs on these inputs by itself: graph_module(*args)",
            ) from cause

    def describe(self) -> str:
        """The operator and its argument shapes, for people."""
        shapes = ", ".join(f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}" for v in self.values)
        target = self.node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        kind = f"{type(self.module).__name__} " if self.module is not None else ""
        return f"{kind}{name}({shapes})"


def call_of(
    node: fx.Node,
    model: fx.GraphModule,
    env: Mapping[fx.Node, Any],
    own: Mapping[str, Value],
    moved: Mapping[torch.device, torch.device],
) -> Call:
    """The call that a node makes, given the values of the nodes before it.

    Args:
        node: a compute node.
        model: its graph module.
        env: the values of the nodes before it.
        own: parameters and buffers of the submodules that it calls or is given.
        moved: devices that the graph names (`torch.arange(n, device=...)`), each with the one that stands for it here.
    """
    args, kwargs = fx.node.map_arg((tuple(node.args), dict(node.kwargs)), lambda n: env[n])
    leaves, spec = pytree.tree_flatten((args, kwargs))
    leaves = [moved.get(leaf, leaf) if isinstance(leaf, torch.device) else leaf for leaf in leaves]
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    return Call(node=node, module=module, spec=spec, leaves=tuple(leaves), own=own, model=model)
