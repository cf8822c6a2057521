"""A model and an example micro-batch → `Captured`: the chain of ways in which a model is turned into a graph."""

from __future__ import annotations

import random
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from autopipe.capture.captured import Captured
from autopipe.capture.exported import export_trace
from autopipe.capture.loss import LossFunction
from autopipe.capture.recorder import Untraceable, is_internal
from autopipe.capture.selfcheck import preserved_state, self_check
from autopipe.capture.trace import Call, TraceFailure, trace
from autopipe.errors import AutopipeError, CaptureError

__all__ = ["Captured", "capture"]

_MAX_OPAQUE = 64


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss_fn: LossFunction | None = None,
    target: Any = None,
    check: bool = True,
) -> Captured:
    """Captures `model(*args, **kwargs)` as a graph, at the shapes given and in the mode that the model is in.

    Tries in order: a recording on fake tensors; the same with torch's compiling flag set; with those modules kept whole
    whose Python reads values of tensors; `torch.export`; and a recording on the real tensors in which every value that
    Python reads becomes a guard that raises where it differs later.

    Args:
        model: any module; its parameters may be on the meta device.
        args, kwargs: an example micro-batch.
        loss_fn, target: with them the loss is the last output of the graph.
        check: replay the micro-batch through model and graph and compare outputs, gradients and buffers. RNG state,
            buffers and gradients are put back. Left out for models on the meta device.

    Raises:
        CaptureError: no way works, or the graph does not compute what the model computes. The message names module, file and line.
    """
    call = Call(args=tuple(args), kwargs=dict(kwargs or {}), loss_fn=loss_fn, target=target)
    on_meta = any(p.device.type == "meta" for p in model.parameters())
    with preserved_state(model), _seeded_for_capture():
        captured = _chain(model, call, on_meta)
    if check and not on_meta:
        self_check(model, captured, call)
    return captured


class _seeded_for_capture:
    """Python's and numpy's random state as it was, for code that draws from them while it is recorded."""

    def __enter__(self) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def __exit__(self, *_: object) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def _chain(model: nn.Module, call: Call, on_meta: bool) -> Captured:
    try:
        return trace(model, call)
    except TraceFailure as failure:
        first = failure
    if isinstance(first.cause, AutopipeError):
        raise first.cause
    try:
        return trace(model, call, compiling=True)
    except TraceFailure:
        pass  # the first cause is the one that is told
    captured = _with_modules_kept(model, call, first)
    if captured is not None:
        return captured
    exported = None if isinstance(first.cause, Untraceable) else export_trace(model, call)
    if exported is not None:
        return exported
    if not on_meta:
        try:
            return trace(model, call, guarded=True)
        except TraceFailure:
            pass  # the first cause is the one that is told
    raise _error(model, first) from first.cause


def _with_modules_kept(model: nn.Module, call: Call, first: TraceFailure) -> Captured | None:
    """Keeps the innermost modules whole whose Python reads values; where that is the model itself, guards what it reads of its inputs."""
    kept, guard_in, last = dict[str, str](), set[str](), first
    for _ in range(_MAX_OPAQUE):
        name = _to_keep(model, last.module, kept)
        if name:
            kept = {n: why for n, why in kept.items() if not n.startswith(f"{name}.")} | {name: _reason(last)}
        elif last.module is not None and last.module not in guard_in:
            guard_in.add(last.module)
            inner = {last.module, *(last.module[:i] for i, c in enumerate(last.module) if c == ".")} - {""}
            kept = {n: why for n, why in kept.items() if n not in inner}
        else:
            break
        try:
            captured = trace(model, call, opaque=frozenset(kept), guard_in=frozenset(guard_in))
        except TraceFailure as failure:
            last = failure
            continue
        seen = {n.target for n in captured.nodes if n.op == "call_module"}
        return replace(captured, opaque={n: why for n, why in kept.items() if n in seen})
    return None


def _to_keep(model: nn.Module, name: str | None, kept: Mapping[str, str]) -> str | None:
    """The innermost module around a failure that is not kept whole yet; None where that is the model itself."""
    while name and (name in kept or isinstance(model.get_submodule(name), (nn.ModuleList, nn.ModuleDict))):
        name = name.rpartition(".")[0]
    return name


def _reason(failure: TraceFailure) -> str:
    return f"{type(failure.cause).__name__}: {str(failure.cause).splitlines()[0] if str(failure.cause) else ''}"[:200]


def _error(model: nn.Module, failure: TraceFailure) -> CaptureError:
    name = failure.module or ""
    module = (
        f"module {name!r} ({type(model.get_submodule(name)).__name__})" if failure.module is not None else "the model"
    )
    return CaptureError(
        f"{module} could not be captured: {_reason(failure)}",
        expected="tensor code that can be run on tensors without data",
        where=_place(failure.cause) or _source(model.get_submodule(name)),
        remedy="move the code that reads tensor values into a submodule of its own, which is then kept whole, or write it as tensor code",
    )


def _source(module: nn.Module) -> str:
    """File and line of a module's forward."""
    code = getattr(type(module).forward, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""


def _place(cause: BaseException) -> str:
    """File and line of the innermost frame of the user's code."""
    seen: BaseException | None = cause
    while seen is not None:
        for frame in reversed(traceback.extract_tb(seen.__traceback__)):
            if not is_internal(frame.filename):
                return f"{frame.filename}:{frame.lineno}"
        seen = seen.__cause__
    return ""
