"""The recording tracer: every outermost torch call becomes a node of an fx graph, while the model's own Python runs on
fake tensors."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from autopipe.capture.compat import is_transformed, without_torch_function
from autopipe.capture.effects import Effects, RandomWatch, hidden_writes, python_random, tensors_in
from autopipe.capture.guards import (
    Evaluator,
    Permission,
    ctc_twin,
)
from autopipe.capture.objects import attributes_of, make_object, make_registered, plain_values
from autopipe.capture.places import source_line
from autopipe.capture.reading import READS_VALUES, SIZES, Untraceable, ValueReads, Varies
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
_ESCAPES = {"numpy", "__array__", "data_ptr", "untyped_storage", "storage", "__dlpack__"}
_REFUSED = {"retain_grad", "register_post_accumulate_grad_hook", "backward"}


class Recorder(ValueReads):
    """Records the calls made under it.

    Args:
        attributes: parameters and buffers as the model sees them while it is recorded, by canonical name.
        permission: where values that Python reads from tensors become equality guards, instead of being refused.
    """

    def __init__(self, attributes: dict[str, Tensor], permission: Permission) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, Any] = {}
        self.effects, self.regions = Effects(), RegionReader()
        self.random: RandomWatch = RandomWatch()  # type: ignore[no-untyped-call]
        self.module_stack: dict[str, tuple[str, type]] = {}
        self.checkpoint_region: int | None = None
        self.inside = 0  # depth of calls that are recorded as one node: what they call is not recorded
        self.permission, self._python_random = permission, python_random()
        self.evaluate: Evaluator | None = None
        self._names = {id(t): name for name, t in reversed(attributes.items())}
        self.bound: dict[int, tuple[Tensor, fx.Node]] = {}
        self._attributes = attributes

    def evaluate_with(self, evaluate: Evaluator) -> None:
        """`evaluate`: finds the values behind fake tensors; raises `Untraceable` where these need more than the
        inputs."""
        self.evaluate = evaluate

    # -- values and nodes ---------------------------------------------------------------------------------------------

    def placeholder(self, name: str, tensor: Tensor) -> None:
        """Adds a model input."""
        node = self.graph.placeholder(name)
        node.meta["val"] = tensor
        self.bound[id(tensor)] = (tensor, node)

    def is_attribute(self, tensor: Tensor) -> bool:
        """Whether the tensor is one of the model's parameters or buffers."""
        return id(tensor) in self._names

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node whose value the tensor is; parameters, buffers and constants get one when they are first read."""
        if id(tensor) in self.bound:
            return self.bound[id(tensor)][1]
        name = self._names.get(id(tensor))
        if name is None:
            if is_transformed(tensor):
                raise Untraceable("code under torch.vmap or torch.func that reads tensors or modules from around it")
            if isinstance(tensor, FakeTensor):
                raise Untraceable(f"a tensor of shape {tuple(tensor.shape)} that no recorded operation made")
            name = f"_autopipe_constant_{len(self.constants)}"
            self.constants[name] = tensor
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = tensor
        self.bound[id(tensor)] = (tensor, node)
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
        if type(value) is dict:
            return {k: self.argument(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if isinstance(value, np.floating | np.integer | np.bool_) and isinstance(value.item(), (int, float)):
            value = value.item()  # code spells it without numpy
        if isinstance(value, _PRINTABLE) and not isinstance(value, Enum):
            return value
        return self._compound(value) if tensors_in(value) else self._object(value)

    def _compound(self, value: Any) -> fx.Node:
        """A node that makes an object with tensors again, from the tensors' nodes."""
        leaves, spec = pytree.tree_flatten(value)
        if len(leaves) == 1 and leaves[0] is value:
            target, args = make_object, (self._object(type(value)), self.argument(dict(attributes_of(value) or {})))
        else:
            target, args = make_registered, (self.argument(leaves), self._object(spec))  # type: ignore[assignment]
        node = self.graph.call_function(target, args)
        self.describe(node, value)
        return node

    def _object(self, value: Any) -> fx.Node:
        """A node for an argument that code cannot spell: it becomes an attribute of the graph module."""
        name = f"_autopipe_constant_{len(self.constants)}"
        self.constants[name] = value
        return self.graph.create_node("get_attr", name)

    def record(
        self,
        op: str,
        target: Any,
        args: Any,
        kwargs: Any,
        run: Callable[[], Any],
        reads: list[Tensor] | None = None,
        varies: Callable[[Any], Varies] | None = None,
    ) -> Any:
        """Runs a call as one node.

        Args:
            reads: tensors that it touches beside its arguments (a module's own).
            varies: of code kept whole that runs on real tensors, what of that which it gave depends on values.
        """
        self.check_python_random()
        node_args, node_kwargs = self.argument(tuple(args)), self.argument(dict(kwargs))
        inputs = tensors_in(args, kwargs) + (reads or [])
        seen = self.effects.before(inputs)
        self.random.clear()
        self.inside += 1
        varying: Varies | None = None
        try:
            with self.random:
                out = run()
            if varies is not None and (self.random.read or self.random.shaped_by_values or plain_values(out)):
                varying = varies(out)  # numbers beside tensors: `tolist` reads values without an operator to be seen
        except DynamicOutputShapeException:
            out = ctc_twin(args, kwargs) if target is F.ctc_loss else None
            out = self.evaluated(op, target, node_args, node_kwargs) if out is None else out
        finally:
            self.inside -= 1
        if op != "call_module" and self._is_noop(out, seen):
            return out
        node = self.graph.create_node(op, target, node_args, node_kwargs)
        self.describe(node, out)
        with without_torch_function():
            self.effects.after(node, seen, out, hidden_writes(target, args, kwargs))
        if self.random.drawn:
            node.meta["random"] = True
        if varying is not None:
            self.guard_whole(node, out, varying)
        elif self.random.shaped_by_values and op != "call_module":
            self.may_be_read(
                f"{getattr(target, '__name__', target)}, the shape of whose result depends on values",
                answer=not self.permission.fixed,
            )
            self.shaped_by_values(node, out)
        elif any(n.meta.get("varying") for n in node.all_input_nodes):
            self.let_vary(node, out, op)
        self._bind(out, node)
        return out

    def check_python_random(self) -> None:
        """Raises where Python or numpy has drawn random numbers since the recording began, outside of what is kept
        whole."""
        if not self.inside and python_random() != self._python_random:
            raise Untraceable("random numbers drawn by Python or numpy, which a graph would draw only once")

    def _is_noop(self, out: Any, seen: list[tuple[Tensor, int]]) -> bool:
        """A call such as `x.contiguous()` that returned its own unchanged argument."""
        return isinstance(out, Tensor) and any(out is t and t._version == v for t, v in seen)

    def describe(self, node: fx.Node, value: Any) -> None:
        node.meta["val"] = value
        node.meta["nn_module_stack"] = dict(self.module_stack)
        node.meta["region"] = self.regions.read()
        node.meta["source"] = source_line()
        if self.checkpoint_region is not None:
            node.meta["checkpoint"] = self.checkpoint_region

    def _bind(self, out: Any, node: fx.Node) -> None:
        if isinstance(out, Tensor):
            self.bound[id(out)] = (out, node)
        elif isinstance(out, (list, tuple)):
            for i, item in enumerate(out):
                self._bind_item(item, node, i)
        elif isinstance(out, dict):
            for key, item in out.items():
                self._bind_item(item, node, key)
        elif attributes := attributes_of(out):
            for key, item in attributes.items():
                self._bind_item(item, node, key, getattr)

    def _bind_item(self, item: Any, node: fx.Node, key: Any, take: Callable[..., Any] = operator.getitem) -> None:
        if tensors_in(item):
            child = self.graph.call_function(take, (node, key))
            self.describe(child, item)
            if node.meta.get("varying") and any(t.dim() for t in tensors_in(item)):
                child.meta["varying"] = True
            with without_torch_function():
                self.effects.after(child, [], item)
            self._bind(item, child)

    # -- torch calls --------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.inside or func is torch._C._set_grad_enabled:
            return func(*args, **kwargs)
        if name in _PLAIN_QUESTIONS:
            if name in SIZES:
                self.may_be_sized(args)
            return func(*args, **kwargs)
        if name == "__get__":
            if func.__self__.__name__ == "shape":
                self.may_be_sized(args)
            return self._property(func, args, kwargs)
        if name == "__set__":
            if func.__self__.__name__ == "data":
                raise Untraceable("an assignment to .data")
            if func.__self__.__name__ == "requires_grad":
                return self._bound_to(Tensor.requires_grad_, "requires_grad_", args, kwargs)
            return func(*args, **kwargs)
        if name in _ESCAPES:
            raise Untraceable(f"Tensor.{name}(), which takes the value out of torch")
        if name in _REFUSED:
            raise Untraceable(f"Tensor.{name}() inside forward")
        if name in ("register_hook", "requires_grad_"):
            return self._bound_to(func, name, args, kwargs)
        if name in READS_VALUES and tensors_in(args, kwargs):
            return self.read_value(func, name, args, kwargs)
        if name == "__iter__":
            return iter(self.record("call_method", "unbind", (args[0], 0), {}, lambda: args[0].unbind(0)))
        if name == "__reversed__":
            return self.record("call_method", "flip", (args[0], 0), {}, lambda: args[0].flip(0))
        op, target = _target(func, name)
        out = self.record(op, target, args, kwargs, lambda: func(*args, **kwargs))
        if not tensors_in(out) and name != "__setitem__":  # a question that is answered with no tensor
            node = next(iter(reversed(self.graph.nodes)))
            if not node.meta.get("writes"):
                self.graph.erase_node(node)
        return out

    def _property(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and id(out) not in self.bound and id(out) not in self._names:
            name = func.__self__.__name__
            return self.record("call_function", getattr, (args[0], name), {}, lambda: out)
        return out

    def _bound_to(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A call that changes what the tensor object is to autograd: a hook, or that it requires a gradient. It stays
        with its maker."""
        tensor = args[0]
        if name == "register_hook":
            if any(tensors_in(cell.cell_contents) for cell in getattr(args[1], "__closure__", None) or ()):
                raise Untraceable("Tensor.register_hook() inside forward, with a function that holds tensors")
            if id(tensor) not in self.bound:
                raise Untraceable(
                    "Tensor.register_hook() on a parameter inside forward, which adds a hook at every call"
                )
        maker = self.node_of(tensor)
        out = func(*args, **kwargs)
        node = self.graph.call_method(name, self.argument(tuple(args)), self.argument(dict(kwargs)))
        self.describe(node, None)
        node.meta["effect"] = True
        self.effects.keep_together([maker, node])
        if name == "requires_grad_":
            return out
        out.remove()
        return _RecordedHandle()


class _RecordedHandle:
    """Stands for the handle of a hook that was recorded."""

    def remove(self) -> None:
        raise Untraceable("the removal of a tensor's hook inside forward")


def _target(func: Any, name: str) -> tuple[str, Any]:
    """The target by which fx calls the function again."""
    if isinstance(func, _DESCRIPTORS):
        return "call_method", name
    if func in _METHOD_NAMES:
        return "call_method", _METHOD_NAMES[func]
    return "call_function", func


# Questions about a tensor that are not about its values: asked often, and never part of the graph.
_PLAIN_QUESTIONS = {
    "size", "dim", "numel", "nelement", "__len__", "stride", "storage_offset", "is_floating_point", "is_complex",
    "is_contiguous", "is_signed", "element_size", "get_device", "ndimension", "is_conj", "is_neg", "is_inference",
    "__repr__", "__format__", "__hash__",
}  # fmt: skip
