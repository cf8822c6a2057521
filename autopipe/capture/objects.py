"""Objects that hold tensors and are no containers of Python: caches, dataclasses, outputs of transformers. How they are seen, copied and made again."""

from __future__ import annotations

import types
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_MAX_DEPTH = 4
_OPAQUE_TYPES = (
    str, bytes, int, float, complex, type(None), type, Enum, np.generic, np.ndarray, torch.dtype, torch.device, torch.Generator,
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


def holds_state(function: Callable[..., Any]) -> bool:
    """Whether a function is closed over tensors or modules, or is no plain function, so that this cannot be told."""
    if not isinstance(function, types.FunctionType):
        return True
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
        if (
            isinstance(value, nn.Module)
            or tensors_inside(value)
            or (isinstance(value, types.FunctionType) and holds_state(value))
        ):
            return True
    return False
