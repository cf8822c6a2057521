"""Whether a captured graph computes what the model computes: one micro-batch through both, outputs, gradients and
buffers compared."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.capture.captured import Captured
from autopipe.capture.checkpointing import with_checkpoints
from autopipe.capture.compat import is_scripted
from autopipe.capture.loss import LossModule
from autopipe.capture.places import source_of
from autopipe.capture.trace import Call, flatten_output
from autopipe.errors import CaptureError
from profiler import accelerator

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Unrepeatable(CaptureError):
    """The model differs from itself on one micro-batch with the same random state: no graph can be compared with it."""


@contextlib.contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Puts back buffers and the random states of torch, Python and numpy when the context ends."""
    buffers = [(b, b.detach().clone()) for b in model.buffers() if b.device.type != "meta"]
    registered = [(m, dict(m._buffers)) for m in model.modules() if not is_scripted(m)]
    states = random.getstate(), np.random.get_state()
    try:
        with accelerator.fork_rng(accelerator.devices()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, own in registered:
            module._buffers.update(own)  # forward may have assigned another tensor
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def seed_all() -> None:
    """The same random state for torch, Python and numpy each time."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@contextlib.contextmanager
def _plain_attributes(model: nn.Module) -> Iterator[None]:
    before = [(m, dict(m.__dict__)) for m in model.modules() if not is_scripted(m)]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)


def self_check(model: nn.Module, captured: Captured, call: Call) -> None:
    """Runs model and graph on the same micro-batch with the same random state.

    Raises:
        CaptureError: they differ; the message names the first output, gradient or buffer that does, and by how much.
    """

    def run_model() -> list[Any]:
        output = model(*call.args, **call.kwargs)
        leaves, spec = flatten_output(output)
        if call.loss_fn is not None:
            target_leaves, target_spec = pytree.tree_flatten(call.target)
            leaves.append(LossModule(call.loss_fn, spec, target_spec)(leaves, target_leaves))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def run_graph() -> list[Any]:
        given: tuple[Any, ...] = (call.args, dict(call.kwargs)) + ((call.target,) if call.loss_fn is not None else ())
        tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
        result: list[Any] = graph_module(*tensors)
        return result

    graph_module = with_checkpoints(captured.graph_module)
    expected = _observe(model, run_model)
    try:
        got = _observe(model, run_graph)
    except Exception as cause:
        raise CaptureError(
            f"the captured graph fails where the model runs: {type(cause).__name__}: "
            f"{str(cause).splitlines()[0] if str(cause) else ''}",
            expected="a graph that runs on the micro-batch it was captured with",
            where=source_of(model, ""),
            remedy="keep code whose path depends on values or on random numbers in a submodule of its own",
        ) from cause
    for name, value in expected.items():
        difference = _difference(got.get(name), value)
        if difference:
            repeats = not _difference(_observe(model, run_model).get(name), value)
            raise (CaptureError if repeats else Unrepeatable)(
                f"the captured graph differs from the model in {name}: {difference}",
                expected="equal outputs, gradients and buffers on one micro-batch",
                where=source_of(model, _owner(name)),
                remedy="look for Python randomness or state that changes from call to call; self_check=False trusts "
                "the graph",
            )


def _owner(name: str) -> str:
    """The module that holds the parameter or buffer that an observed value is of; the model for its outputs."""
    kind, _, value = name.rpartition(" ")
    return "" if kind == "output" else value.rpartition(".")[0]


def _observe(model: nn.Module, run: Any) -> dict[str, Any]:
    """Outputs, gradients and buffers of one run; the model's state is put back."""
    with preserved_state(model), _plain_attributes(model):
        seed_all()
        outputs = run()
        seen: dict[str, Any] = {f"output {i}": _copy(v) for i, v in enumerate(outputs)}
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        roots = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        if roots and parameters:
            weights = [torch.linspace(0.5, 1.5, o.numel(), device=o.device).to(o.dtype).view(o.shape) for o in roots]
            seen |= {f"the gradient of {n}": g for n, g in _gradients(parameters, roots, weights).items()}
        seen |= {f"buffer {n}": _copy(b) for n, b in model.named_buffers()}
    return seen


def _gradients(
    parameters: dict[str, nn.Parameter], roots: list[Tensor], weights: list[Tensor]
) -> dict[str, Tensor | None]:
    """The gradients of one backward; those that were there are put back. (Reentrant checkpoints refuse
    `torch.autograd.grad`.)"""
    before = {n: p.grad for n, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    try:
        torch.autograd.backward(roots, weights)
        return {n: p.grad for n, p in parameters.items()}
    finally:
        for n, p in parameters.items():
            p.grad = before[n]


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _difference(got: Any, expected: Any) -> str:
    """The difference in words; empty if there is none."""
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        return "" if got is expected or got == expected else f"{_short(got)}, expected {_short(expected)}"
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{_short(got)}, expected {_short(expected)}"
    if got.layout is not torch.strided:
        got, expected = got.to_dense(), expected.to_dense()
    if not (expected.is_floating_point() or expected.is_complex()):
        return "" if torch.equal(got, expected) else "other values"
    tolerance = _TOLERANCE.get(expected.dtype, 1e-5)
    both = torch.isfinite(expected)
    if not torch.equal(both, torch.isfinite(got)):
        return "values that are not finite"
    error = float((got - expected)[both].abs().norm())
    scale = float(expected[both].abs().norm())
    return "" if error <= tolerance * max(scale, 1e-6) else f"relative error {error / max(scale, 1e-30):.2e}"


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else repr(value)
