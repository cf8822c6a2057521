"""Values of tensors that Python reads while a model is recorded: how they are found, and the nodes that check them at
every run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F

from autopipe.capture.compat import without_torch_function
from autopipe.capture.objects import map_tensors, plain_values, tensors_inside
from autopipe.capture.places import Places

_REMEDY = "keep the code that reads it in one submodule, or make it tensor code such as torch.where"


def guard(name: str, expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises where a value that steered the model's Python differs from the one seen when it was captured."""
    got = getattr(Tensor, name)(*args, **kwargs)
    if got != expected:
        raise RuntimeError(
            f"the model was captured while Tensor.{name}() gave {expected!r}, and now it gives {got!r}; remedy: "
            f"{_REMEDY}"
        )


def guard_shape(tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raises where a shape that depends on values differs from the one seen when the model was captured."""
    if tuple(tensor.shape) != expected:
        raise RuntimeError(
            f"the model was captured while a tensor whose shape depends on values had shape {expected}, and now it has "
            f"{tuple(tensor.shape)}; remedy: {_REMEDY}"
        )


def guard_plain(value: Any, numbers: list[Any], shapes: list[tuple[int, ...]] | None) -> None:
    """Raises where code kept whole gives other numbers beside its tensors, or other shapes, than when the model was
    captured."""
    seen = {"numbers": (plain_values(value), numbers)}
    if shapes is not None:
        seen["shapes"] = [tuple(t.shape) for t in tensors_inside(value)], [tuple(s) for s in shapes]
    for what, (got, expected) in seen.items():
        if got != expected:
            raise RuntimeError(
                f"the model was captured while code that reads values gave the {what} {expected!r}, and now it "
                f"gives {got!r}; "
                f"remedy: capture the model again, or keep the code that uses them in one submodule"
            )


GUARDS = (guard, guard_shape, guard_plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Permission:
    """Turns values of tensors that Python reads into guards.

    Attributes:
        on_fakes: the recording runs on fake tensors, whose values must be computed from the inputs.
        everywhere: they may be in all code.
        fixed: shapes that depend on values are guarded; else they may vary, and no Python may ask for them.
        places: modules, and methods as `name:method`, in whose own code they may.
        answers_in: modules in whose own code the answers to yes-no questions may, such as `(mask > 0).all()`.
        of: finds the method that runs.
    """

    on_fakes: bool
    everywhere: bool
    fixed: bool
    places: frozenset[str]
    answers_in: frozenset[str]
    of: Places

    def given(self, module: str, answer: bool) -> bool:
        """Whether a value, or the answer to a yes-no question, that `module`, the innermost that runs, reads now may
        become a guard."""
        if self.everywhere:
            return True
        if module not in self.places and not (answer and module in self.answers_in):
            return False
        method = None if self.on_fakes else self.of.method_now()
        return method is None or method in self.places


def ctc_twin(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Result of `F.ctc_loss` without values: it reads lengths, on which the shape of its result does not
    depend."""
    names = ("log_probs", "targets", "input_lengths", "target_lengths", "blank", "reduction")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("reduction", "mean") == "none":
        return None
    total: Tensor = given["log_probs"].sum()
    return total


def drawn_at_random(nodes: Iterable[fx.Node]) -> bool:
    """Whether the values of these nodes come from an operator that draws; what only follows a dropout does not
    count."""
    waiting = list(nodes)
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.meta.get("random") and node.op != "call_module" and node.target is not F.dropout:
            return True
        waiting += [v for v in node.all_input_nodes if v not in seen]
        seen.update(node.all_input_nodes)
    return False


_OUTSIDE_OF_UNIT = {  # what a comparison of a number drawn from [0, 1) with a bound says, if it is settled
    "lt": lambda bound: False if bound <= 0 else True if bound >= 1 else None,
    "le": lambda bound: False if bound < 0 else True if bound >= 1 else None,
    "gt": lambda bound: True if bound < 0 else False if bound >= 1 else None,
    "ge": lambda bound: True if bound <= 0 else False if bound >= 1 else None,
}


def settled(node: fx.Node) -> bool | None:
    """Result of a comparison that does not depend on what is drawn, such as `torch.rand([]) < layerdrop` where that is
    0; None where it is open."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    answer = _OUTSIDE_OF_UNIT.get(name.strip("_"))
    if answer is None or len(node.args) != 2 or not isinstance(node.args[1], (int, float)):
        return None
    drawn = node.args[0]
    return answer(node.args[1]) if isinstance(drawn, fx.Node) and drawn.target is torch.rand else None


class Evaluator:
    """Computes real values of nodes that need nothing but the model's inputs, buffers and constants.

    Args:
        inputs: the real value of each placeholder, by name.
        attributes: real buffers by name.
        constants: the recorder's constants.
        fake_mode: makes fake twins.
        untraceable: the error to raise where a value needs parameters, modules, random numbers or written tensors.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        attributes: Mapping[str, Tensor],
        constants: Mapping[str, Any],
        untraceable: Callable[[str], Exception],
        fake_mode: FakeTensorMode,
    ) -> None:
        self._inputs, self._attributes, self._constants, self._untraceable = inputs, attributes, constants, untraceable
        self._fake_mode = fake_mode
        self._known: dict[fx.Node, Any] = {}

    def __call__(self, name: str, args: Any, kwargs: Any) -> Any:
        """Result of the Tensor method `name` for the real values of these nodes."""
        with without_torch_function(), unset_fake_temporarily(), torch.no_grad():
            return getattr(Tensor, name)(*fx.map_arg(args, self._value), **fx.map_arg(kwargs, self._value))

    def fake_twin(self, op: str, target: Any, args: Any, kwargs: Any) -> Any:
        """The fake twin of what a call gives for the real values of these nodes."""
        if op == "call_module":
            raise self._untraceable(f"module {target!r}, the shape of whose result depends on values")
        with without_torch_function(), unset_fake_temporarily(), torch.no_grad():
            args, kwargs = fx.map_arg(args, self._value), fx.map_arg(kwargs, self._value)
            out = getattr(args[0], target)(*args[1:], **kwargs) if op == "call_method" else target(*args, **kwargs)
        return map_tensors(lambda t: self._fake_mode.from_tensor(t, static_shapes=True), out)

    def _value(self, node: fx.Node) -> Any:
        if node not in self._known:
            self._known[node] = self._compute(node)
        return self._known[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder" and self._inputs[node.name].device.type != "meta":
            return self._inputs[node.name]
        if node.op == "get_attr" and node.target in self._constants:
            return self._constants[str(node.target)]
        if node.op == "get_attr" and node.target in self._attributes:
            return self._attributes[str(node.target)]
        touched = any(user.meta.get("writes") and user.target not in GUARDS for user in [node, *node.users])
        if node.op not in ("call_function", "call_method") or node.meta.get("random") or touched:
            raise self._untraceable(
                "a value of a tensor that Python reads, and that does not follow from the inputs alone"
            )
        args, kwargs = fx.map_arg(node.args, self._value), fx.map_arg(node.kwargs, self._value)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
