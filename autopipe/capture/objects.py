"""Objects that hold tensors and are no containers of Python: caches, dataclasses, outputs of transformers. How they are
seen, copied and made again."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_MAX_DEPTH = 4
_OPAQUE_TYPES = (
    str, bytes, int, float, complex, type(None), type, Enum, np.generic, np.ndarray,
    torch.dtype, torch.device, torch.Generator,
    nn.Module, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, pytree.TreeSpec,
)  # fmt: skip


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that nobody registered as a pytree; None for values that are not looked into."""
    if isinstance(value, (Tensor, *_OPAQUE_TYPES)) or type(value).__module__.partition(".")[0] in ("builtins", "torch"):
        return None
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else None


def tensors_inside(value: Any, depth: int = 0) -> list[Tensor]:
    """Every tensor in nested containers and in the attributes of objects."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif depth < _MAX_DEPTH and (attributes := attributes_of(leaf)):
            found += tensors_inside(attributes, depth + 1)
    return found


def plain_values(value: Any, depth: int = 0) -> list[Any]:
    """Every number and string in nested containers and in the attributes of objects, in order."""
    found: list[Any] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, (bool, int, float, complex, str)):
            found.append(leaf)
        elif depth < _MAX_DEPTH and (attributes := attributes_of(leaf)):
            found += plain_values(attributes, depth + 1)
    return found


def map_tensors(function: Callable[[Tensor], Any], value: Any, depth: int = 0) -> Any:
    """The value with `function` of every tensor in the place of the tensor; objects that hold any are copied."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        attributes = attributes_of(leaf)
        if depth >= _MAX_DEPTH or not attributes or not tensors_inside(attributes, depth + 1):
            return leaf
        return make_object(type(leaf), map_tensors(function, dict(attributes), depth + 1))

    return pytree.tree_map(one, value)


def make_object(cls: type, attributes: dict[str, Any]) -> Any:
    """An object of a class with these attributes; its `__init__` does not run."""
    made = cls.__new__(cls)  # type: ignore[call-overload]
    made.__dict__.update(attributes)
    return made


def make_registered(leaves: list[Any], spec: pytree.TreeSpec) -> Any:
    """A value of a type that is registered as a pytree, from its leaves."""
    return pytree.tree_unflatten(leaves, spec)


def closed_over(function: Callable[..., Any]) -> list[Tensor] | None:
    """The tensors that a plain function, and those that it calls by closure, are closed over, in order.

    None where it is closed over modules, or over anything whose tensors cannot be exchanged.
    """
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    try:
        _with_cells(function, keep, ())
    except _Fixed:
        return None
    return found


def closed_over_others(function: Callable[..., Any], tensors: Iterable[Tensor]) -> Callable[..., Any]:
    """The same function over other tensors, in the order of `closed_over`."""
    others = iter(tensors)
    made: Callable[..., Any] = _with_cells(function, lambda _: next(others), ())
    return made


class _Fixed(Exception):
    """A function whose tensors cannot be exchanged."""


def _with_cells(function: Any, exchange: Callable[[Tensor], Tensor], around: tuple[Any, ...]) -> Any:
    if not isinstance(function, types.FunctionType) or function in around:
        raise _Fixed
    if tensors_inside((function.__defaults__, function.__kwdefaults__)):
        raise _Fixed

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return exchange(value)
        if isinstance(value, types.FunctionType):
            return _with_cells(value, exchange, (*around, function)) if value.__closure__ else value
        if isinstance(value, nn.Module) or tensors_inside(value):
            raise _Fixed
        return value

    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(types.CellType(pytree.tree_map(one, cell.cell_contents)))
        except ValueError:  # a variable that has no value yet
            cells.append(cell)
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made
