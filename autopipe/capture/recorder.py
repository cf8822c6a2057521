"""The recording tracer: every outermost torch call becomes a node of an fx graph, while the model's own Python runs on fake tensors."""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from autopipe.capture.compat import without_torch_function
from autopipe.capture.effects import Effects, RandomWatch, tensors_in
from autopipe.capture.regions import RegionReader

# Python-level methods of Tensor; some of them carry a misleading __name__.
_METHOD_NAMES = {
    v: k for k, v in vars(Tensor).items() if callable(v) and not isinstance(v, (staticmethod, classmethod, type))
}
_PRINTABLE = (
    str, bytes, int, float, complex, bool, type(None), type(...), range,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_DESCRIPTORS = (types.MethodDescriptorType, types.WrapperDescriptorType)
_READS_VALUES = {
    "item",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__complex__",
    "tolist",
    "is_nonzero",
    "equal",
    "allclose",
    "__contains__",
}
_ESCAPES = {"numpy", "__array__", "data_ptr", "untyped_storage", "storage", "__dlpack__"}
_HOOKS = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook"}


class Untraceable(Exception):
    """Something in the model's Python that a graph cannot hold; the message says what, the capture chain adds where."""


class Recorder(TorchFunctionMode):
    """Records the calls made under it.

    Args:
        attributes: parameters and buffers as the model sees them while it is recorded, by canonical name.
        guarded: record values that Python reads from tensors as equality guards, instead of refusing them.
    """

    def __init__(self, attributes: dict[str, Tensor], guarded: bool = False) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, Any] = {}
        self.effects, self.regions = Effects(), RegionReader()
        self.random: RandomWatch = RandomWatch()  # type: ignore[no-untyped-call]
        self.module_stack: dict[str, tuple[str, type]] = {}
        self.checkpoint_region: int | None = None
        self.inside = 0  # depth of calls that are recorded as one node: what they call is not recorded
        self._guarded = guarded
        self._names = {id(t): name for name, t in reversed(attributes.items())}
        self._bound: dict[int, tuple[Tensor, fx.Node]] = {}
        self._attributes = attributes

    # -- values and nodes ---------------------------------------------------------------------------------------------

    def placeholder(self, name: str, tensor: Tensor) -> None:
        """Adds a model input."""
        node = self.graph.placeholder(name)
        node.meta["val"] = tensor
        self._bound[id(tensor)] = (tensor, node)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node whose value the tensor is; parameters, buffers and constants get one when they are first read."""
        if id(tensor) in self._bound:
            return self._bound[id(tensor)][1]
        name = self._names.get(id(tensor))
        if name is None:
            if isinstance(tensor, FakeTensor):
                raise Untraceable(f"a tensor of shape {tuple(tensor.shape)} that no recorded operation made")
            name = f"_autopipe_constant_{len(self.constants)}"
            self.constants[name] = tensor
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = tensor
        self._bound[id(tensor)] = (tensor, node)
        return node

    def argument(self, value: Any) -> Any:
        """A call's argument with tensors replaced by their nodes."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, (list, tuple)):
            items = [self.argument(v) for v in value]
            if hasattr(value, "_fields"):
                return type(value)(*items)
            return type(value)(items) if type(value) in (list, tuple) else tuple(items)
        if isinstance(value, dict):
            return {k: self.argument(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        return value if isinstance(value, _PRINTABLE) else self._object(value)

    def _object(self, value: Any) -> fx.Node:
        """A node for an argument that code cannot spell: it becomes an attribute of the graph module."""
        name = f"_autopipe_constant_{len(self.constants)}"
        self.constants[name] = value
        return self.graph.create_node("get_attr", name)

    def record(
        self, op: str, target: Any, args: Any, kwargs: Any, run: Callable[[], Any], reads: list[Tensor] | None = None
    ) -> Any:
        """Runs a call as one node. `reads`: tensors that it touches beside its arguments (a module's own)."""
        node_args, node_kwargs = self.argument(tuple(args)), self.argument(dict(kwargs))
        inputs = tensors_in(args, kwargs) + (reads or [])
        seen = self.effects.before(inputs)
        self.random.drawn = False
        self.inside += 1
        try:
            with self.random:
                out = run()
        finally:
            self.inside -= 1
        if op != "call_module" and self._is_noop(out, seen):
            return out
        node = self.graph.create_node(op, target, node_args, node_kwargs)
        self._describe(node, out)
        with without_torch_function():
            self.effects.after(node, seen, out, hidden_writes(target, args, kwargs))
        if self.random.drawn:
            node.meta["random"] = True
        self._bind(out, node)
        return out

    def _is_noop(self, out: Any, seen: list[tuple[Tensor, int]]) -> bool:
        """A call such as `x.contiguous()` that returned its own unchanged argument."""
        return isinstance(out, Tensor) and any(out is t and t._version == v for t, v in seen)

    def _describe(self, node: fx.Node, value: Any) -> None:
        node.meta["val"] = value
        node.meta["nn_module_stack"] = dict(self.module_stack)
        node.meta["region"] = self.regions.read()
        node.meta["source"] = source_line()
        if self.checkpoint_region is not None:
            node.meta["checkpoint"] = self.checkpoint_region

    def _bind(self, out: Any, node: fx.Node) -> None:
        if isinstance(out, Tensor):
            self._bound[id(out)] = (out, node)
        elif isinstance(out, (list, tuple)):
            for i, item in enumerate(out):
                self._bind_item(item, node, i)
        elif isinstance(out, dict):
            for key, item in out.items():
                self._bind_item(item, node, key)

    def _bind_item(self, item: Any, node: fx.Node, key: Any) -> None:
        if tensors_in(item):
            child = self.graph.call_function(operator.getitem, (node, key))
            self._describe(child, item)
            with without_torch_function():
                self.effects.after(child, [], item)
            self._bind(item, child)

    # -- torch calls --------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.inside or func is torch._C._set_grad_enabled or name in _PLAIN_QUESTIONS:
            return func(*args, **kwargs)
        if name == "__get__":
            return self._property(func, args, kwargs)
        if name == "__set__":
            if func.__self__.__name__ == "data":
                raise Untraceable("an assignment to .data")
            return func(*args, **kwargs)
        if name in _ESCAPES:
            raise Untraceable(f"Tensor.{name}(), which takes the value out of torch")
        if name in _HOOKS:
            raise Untraceable(f"Tensor.{name}() inside forward")
        if name in _READS_VALUES and tensors_in(args, kwargs):
            return self._read_value(func, name, args, kwargs)
        if name == "__iter__":
            return iter(self.record("call_method", "unbind", (args[0], 0), {}, lambda: args[0].unbind(0)))
        if name == "__reversed__":
            return self.record("call_method", "flip", (args[0], 0), {}, lambda: args[0].flip(0))
        op, target = _target(func, name)
        recorded = False

        def run() -> Any:
            nonlocal recorded
            out = func(*args, **kwargs)
            recorded = bool(tensors_in(out)) or name == "__setitem__"
            return out

        out = self.record(op, target, args, kwargs, run)
        if not recorded:
            node = next(iter(reversed(self.graph.nodes)))
            if not node.meta.get("writes"):
                self.graph.erase_node(node)
        return out

    def _property(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and id(out) not in self._bound and id(out) not in self._names:
            name = func.__self__.__name__
            if name == "data":
                raise Untraceable("a read of .data")
            return self.record("call_function", getattr, (args[0], name), {}, lambda: out)
        return out

    def _read_value(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if self._guarded:
            value = func(*args, **kwargs)
            node = self.graph.call_function(
                guard, (name, value, self.argument(tuple(args)), self.argument(dict(kwargs)))
            )
            self._describe(node, None)
            node.meta["writes"] = True  # keeps it from being removed as dead code
            return value
        try:
            return func(*args, **kwargs)
        except Exception as cause:
            raise Untraceable(f"Tensor.{name}(), so that Python reads a value of a tensor") from cause


def guard(name: str, expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises where a value that steered the model's Python differs from the one seen when it was captured."""
    got = getattr(Tensor, name)(*args, **kwargs)
    if got != expected:
        raise RuntimeError(
            f"the model was captured while Tensor.{name}() gave {expected!r}, and now it gives {got!r}; remedy: keep the "
            "code that reads it in one submodule, or make it tensor code such as torch.where"
        )


def _target(func: Any, name: str) -> tuple[str, Any]:
    """How fx calls the function again."""
    if isinstance(func, _DESCRIPTORS):
        return "call_method", name
    if func in _METHOD_NAMES:
        return "call_method", _METHOD_NAMES[func]
    return "call_function", func


# Questions about a tensor that are not about its values: asked often, and never part of the graph.
_PLAIN_QUESTIONS = {
    "size", "dim", "numel", "nelement", "__len__", "stride", "storage_offset", "is_floating_point", "is_complex", "is_contiguous",
    "is_signed", "element_size", "get_device", "ndimension", "is_conj", "is_neg", "is_inference", "__repr__", "__format__", "__hash__",
}  # fmt: skip


def hidden_writes(target: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that a call writes without counting up their version: the running statistics of functional norms."""
    if target in (F.batch_norm, F.instance_norm):
        names = ("input", "running_mean", "running_var", "weight", "bias", "training")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        updates = given.get("training", False) if target is F.batch_norm else given.get("use_input_stats", True)
        return [given[n] for n in names[1:3] if updates and given.get(n) is not None]
    return []


def source_line() -> str:
    """File and line of the innermost frame outside torch and autopipe."""
    frame = sys._getframe(1)
    while frame is not None and is_internal(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


_TORCH_DIR = torch.__path__[0]
_OWN_DIR = __file__.rsplit("/", 1)[0]


def is_internal(filename: str) -> bool:
    return filename.startswith((_TORCH_DIR, _OWN_DIR, "<")) or "contextlib" in filename
