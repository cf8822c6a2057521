"""The part of the recorder that meets values: what Python reads from tensors, and shapes that depend on values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from autopipe.capture.effects import RandomWatch, tensors_in
from autopipe.capture.guards import Evaluator, Permission, drawn_at_random, guard, guard_plain, guard_shape, settled
from autopipe.capture.objects import plain_values

_ASKS = {"__bool__", "is_nonzero", "equal", "allclose", "__contains__"}
READS_VALUES = _ASKS | {"item", "__int__", "__float__", "__index__", "__complex__", "tolist"}
SIZES = {"size", "numel", "nelement", "__len__", "stride"}


class Untraceable(Exception):
    """Something in the model's Python that a graph cannot hold; the message says what, the capture chain adds where."""


class SizeRead(Untraceable):
    """Python asks for a size that depends on values."""


class Varies(NamedTuple):
    """Finds the outputs of code kept whole that depend on the values of its inputs."""

    shapes: bool
    numbers: bool


class ValueReads(TorchFunctionMode, ABC):
    """Decides what is done where a value of a tensor, or a shape that depends on values, is read: a guard, or a
    refusal.

    A tensor whose shape depends on values is marked by `meta["varying"]`, unless shapes are to be fixed: then it is
    guarded.
    """

    graph: fx.Graph
    random: RandomWatch
    module_stack: dict[str, tuple[str, type]]
    permission: Permission
    evaluate: Evaluator | None
    bound: dict[int, tuple[Tensor, fx.Node]]

    @abstractmethod
    def argument(self, value: Any) -> Any:
        """A value as an argument of a node."""

    @abstractmethod
    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that made a tensor."""

    @abstractmethod
    def describe(self, node: fx.Node, value: Any) -> None:
        """Notes on a node what it gave, and where it was recorded."""

    def guard_whole(self, node: fx.Node, out: Any, varying: Varies) -> None:
        """Code kept whole that read values: the numbers that it gives are guarded, and its shapes where they may not
        vary.

        Raises:
            Untraceable: the numbers vary, so that a guard would stop nearly every run.
        """
        numbers = plain_values(out)
        if varying.numbers and not self.permission.everywhere:
            raise Untraceable(f"Python values such as {numbers[0]!r} that follow from the values of tensors")
        free = varying.shapes and not self.permission.fixed
        if free:
            node.meta["varying"] = True
        if numbers or not free:
            shapes = None if free else [tuple(t.shape) for t in tensors_in(out)]
            self.guard_node(guard_plain, (node, numbers, shapes))

    def shaped_by_values(self, node: fx.Node, out: Any) -> None:
        """A result whose shape depends on values may vary, or is guarded where shapes are to be fixed."""
        shapes = [tuple(t.shape) for t in tensors_in(out)]
        if not any(shapes):
            return  # scalars
        if not self.permission.fixed:
            node.meta["varying"] = True
        elif isinstance(out, Tensor):
            self.guard_node(guard_shape, (node, shapes[0]))
        else:
            self.guard_node(guard_plain, (node, plain_values(out), shapes))

    def let_vary(self, node: fx.Node, out: Any, op: str) -> None:
        """Mark tensors made from one whose shape depends on values: their shapes depend on them too."""
        if op != "call_module" and not isinstance(out, Tensor):
            raise SizeRead(f"{node.target}, whose result depends on the size of a tensor that depends on values")
        if any(t.dim() for t in tensors_in(out)):
            node.meta["varying"] = True

    def evaluated(self, op: str, target: Any, args: Any, kwargs: Any) -> Any:
        """The fake twin of a value whose shape depends on values, where these follow from the model's inputs."""
        self.may_be_read(
            f"{getattr(target, '__name__', target)}, the shape of whose result depends on values",
            answer=not self.permission.fixed,
        )
        assert self.evaluate is not None
        self.random.shaped_by_values = True
        return self.evaluate.fake_twin(op, target, args, kwargs)

    def may_be_read(self, what: str, cause: Exception | None = None, answer: bool = False) -> None:
        """Raises where what the running code reads, a value or the answer to a yes-no question, may not become a
        guard."""
        if not self.permission.given(next(reversed(self.module_stack), ""), answer):
            raise Untraceable(what) from cause

    def may_be_sized(self, args: Any) -> None:
        """Raises where the size of a tensor, which Python is about to read, depends on values."""
        bound = self.bound.get(id(args[0])) if args else None
        if bound is not None and bound[1].meta.get("varying"):
            raise SizeRead("the size of a tensor that depends on values")

    def read_value(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        node_args, node_kwargs = self.argument(tuple(args)), self.argument(dict(kwargs))
        if name == "__bool__" and (known := settled(self.node_of(args[0]))) is not None:
            return known
        what, answer = f"Tensor.{name}(), so that Python reads a value", name in _ASKS
        if not self.permission.on_fakes:
            if drawn_at_random(self.node_of(t) for t in tensors_in(args)):
                raise Untraceable(f"{what} drawn at random")
            self.may_be_read(f"{what} of a tensor", answer=answer)
            value = func(*args, **kwargs)
        else:
            try:
                return func(*args, **kwargs)
            except Exception as cause:  # noqa: BLE001 (`_may_be_read` raises it again)
                self.may_be_read(f"{what} of a tensor", cause, answer)
                assert self.evaluate is not None
                value = self.evaluate(name, node_args, node_kwargs)
        self.guard_node(guard, (name, value, node_args, node_kwargs))
        return value

    def guard_node(self, target: Callable[..., Any], args: Any) -> None:
        node = self.graph.call_function(target, args)
        self.describe(node, None)
        node.meta["writes"] = True  # keeps it from being removed as dead code
