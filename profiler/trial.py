"""One node, run again and again: only its own work lies between the marks of the clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from profiler.call import Call
from profiler.clock import Clock
from profiler.memory import tensors_in
from profiler.trace import Trace


@dataclass(slots=True, kw_only=True)
class Trial:
    """Runs a node again and again, with everything that is not the node's own work kept outside the timed part."""

    call: Call
    trace: Trace
    tensors: Sequence[Tensor]
    own: Mapping[str, Tensor]
    grads: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    accumulated: list[Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        values = self.call.values
        self.tensors = [t.detach().requires_grad_(v.requires_grad) for t, v in zip(self.tensors, values, strict=True)]
        activations = [t for t, v in zip(self.tensors, values, strict=True) if v.target is None]
        everything = {id(t): t for t in (*self.tensors, *self.own.values())}
        self.leaves = [t for t in everything.values() if t.requires_grad and torch.is_grad_enabled()]
        inner = {id(t) for t in activations}
        self.accumulated = [None if id(t) in inner else torch.zeros_like(t) for t in self.leaves]

    @property
    def is_differentiated(self) -> bool:
        """Whether there is a backward."""
        return bool(self.leaves) and any(o.requires_grad for o in self.trace.outputs)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fresh copies of what the node writes to: a leaf must not be written to, and its values must not drift."""
        if torch.is_autocast_enabled(self._device_type):
            torch.clear_autocast_cache()  # each micro-batch casts the parameters anew
        return self.call.bind([t.clone() if i in self.trace.written else t for i, t in enumerate(self.tensors)])

    @property
    def _device_type(self) -> str:
        return next((t.device.type for t in (*self.tensors, *self.own.values())), "cpu")

    def backward(self, outputs: list[Tensor]) -> None:
        found = torch.autograd.grad(outputs, self.leaves, self.grads, allow_unused=True)
        for grad, total in zip(found, self.accumulated, strict=True):
            # From the second micro-batch on, the gradient of a parameter is added to the one that is there.
            if grad is not None and total is not None:
                total.add_(grad)

    def forward(self, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
        """Runs it; the outputs that a gradient flows back from."""
        return _differentiable(tensors_in(self.call.function(*arguments[0], **arguments[1])))

    def make_grads(self, outputs: list[Tensor]) -> None:
        """Makes the gradients that backward begins with."""
        self.grads = [torch.randn_like(o) for o in outputs]

    @property
    def given_bytes(self) -> int:
        """Bytes of the gradients that backward begins with."""
        return sum(g.numel() * g.element_size() for g in self.grads)

    @property
    def asked_bytes(self) -> int:
        """Bytes of the gradients that backward makes."""
        return sum(t.numel() * t.element_size() for t in self.leaves) if self.is_differentiated else 0

    def run(self, clock: Clock) -> tuple[float, float]:
        """One run; microseconds of forward and of backward."""
        args, kwargs = self.arguments()
        function = self.call.function
        start = clock.mark()
        result = function(*args, **kwargs)
        end = clock.mark()
        forward_us = clock.elapsed_us(start, end)
        if not self.is_differentiated:
            return forward_us, 0.0
        outputs = _differentiable(tensors_in(result))
        del result
        if not self.grads:
            self.make_grads(outputs)
        start = clock.mark()
        self.backward(outputs)
        end = clock.mark()
        return forward_us, clock.elapsed_us(start, end)


def _differentiable(tensors: list[Tensor]) -> list[Tensor]:
    """Those that a gradient flows back from, each once."""
    return [t for t in {id(t): t for t in tensors}.values() if t.requires_grad]
