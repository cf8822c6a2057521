"""Signatures: two nodes with the same one cost the same. Operator, attributes, shapes, dtypes, strides, gradient flags
and modes, as a hash."""

from __future__ import annotations

import enum
import hashlib
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from profiler.call import Call
from profiler.values import Value

_LIBRARIES = ("torch", "operator", "_operator", "math", "builtins")
_PLAIN = (
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Identifies what a node costs.

    Attributes:
        key: a hash; nodes with equal keys are measured once.
        is_portable: whether the key means the same in another process: false where the node runs the user's own code,
            which may change, or holds an object that can only be told by its identity.
    """

    key: str
    is_portable: bool


def signature_of(call: Call, device_type: str) -> Signature:
    """The signature of a call under the modes that hold now."""
    writer = _Writer()
    sources = call.sources
    numbers = {id(s): i for i, s in enumerate(sources)}

    def tensor(v: Value) -> str:
        kind = "parameter" if v.target is not None else ""
        return f"T({v.dtype},{v.shape},{v.stride},{v.requires_grad},{numbers[id(v.storage)]},{kind})"

    parts = [
        call.node.op,
        call.node.target if call.node.op == "call_method" else "",
        writer.write(call.node.target) if call.node.op == "call_function" else "",
        writer.module(call.module) if call.module is not None else "",
        str(call.spec),
        ";".join(tensor(x) if isinstance(x, Value) else writer.write(x) for x in call.leaves),
        ";".join(tensor(v) for v in call.own.values()),
        _modes(device_type),
    ]
    text = "|".join(str(p) for p in parts)
    return Signature(key=hashlib.sha256(text.encode()).hexdigest()[:32], is_portable=writer.is_portable)


def _modes(device_type: str) -> str:
    autocast = torch.is_autocast_enabled(device_type)
    return (
        f"{torch.is_grad_enabled()},{autocast},{torch.get_autocast_dtype(device_type) if autocast else ''},"
        f"{torch.get_default_dtype()},{torch.get_float32_matmul_precision()},"
        f"{torch.are_deterministic_algorithms_enabled()}"
    )


class _Writer:
    """Writes values as text; remembers whether the text means anything outside this process."""

    def __init__(self) -> None:
        self.is_portable = True

    def write(self, x: Any) -> str:
        """One value as text, equal for equal values."""
        if isinstance(x, enum.Enum):
            return str(x)
        if isinstance(x, _PLAIN):
            return f"{type(x).__name__}:{x!r}"
        if isinstance(x, slice):
            return f"slice({self.write(x.start)},{self.write(x.stop)},{self.write(x.step)})"
        if isinstance(x, (tuple, list, set, frozenset)):
            return f"{type(x).__name__}({','.join(self.write(e) for e in x)})"
        if isinstance(x, dict):
            return "{" + ",".join(f"{self.write(k)}:{self.write(v)}" for k, v in x.items()) + "}"
        if x is Ellipsis:
            return "..."
        if isinstance(x, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return str(x)
        if isinstance(x, nn.Module):
            return self.module(x)
        if callable(x):
            return self._callable(x)
        return self._identity(x)

    def _callable(self, x: Any) -> str:
        owner = getattr(x, "__self__", None)
        prefix = ""
        if owner is not None and not isinstance(owner, types.ModuleType):
            prefix = self._callable(owner) if isinstance(owner, type) else self._identity(owner)
        name = f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', getattr(x, '__name__', ''))}"
        if isinstance(x, torch.Generator) or not hasattr(x, "__name__") or "<" in name:
            return prefix + self._identity(x)
        if (x.__module__ or "builtins").split(".")[0] not in _LIBRARIES:
            self.is_portable = False
        return f"{prefix}.{name}"

    def module(self, module: nn.Module) -> str:
        """A module: its class and every plain attribute, since `extra_repr` leaves some out (heads of attention)."""
        cls = type(module)
        if cls.__module__.split(".")[0] != "torch":
            self.is_portable = False
        children = ",".join(f"{n}:{self.module(m)}" for n, m in module.named_children())
        if isinstance(module, fx.GraphModule):
            return f"graph({module.code};{children})"
        registries = ("_parameters", "_buffers", "_modules")
        attributes = {
            k: v for k, v in vars(module).items() if k not in registries and not (isinstance(v, (dict, set)) and not v)
        }
        body = ",".join(f"{k}={self.write(v)}" for k, v in sorted(attributes.items()))
        return f"{cls.__module__}.{cls.__qualname__}({body};{children})"

    def _identity(self, x: Any) -> str:
        self.is_portable = False
        return f"{type(x).__module__}.{type(x).__qualname__}@{id(x)}"
