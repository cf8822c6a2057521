"""A model and an example micro-batch → `Captured`: the chain of ways in which a model is turned into a graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from autopipe.capture.captured import Captured
from autopipe.capture.fallbacks import recordings
from autopipe.capture.loss import LossFunction
from autopipe.capture.places import source_of
from autopipe.capture.selfcheck import Unrepeatable, preserved_state, seed_all, self_check
from autopipe.capture.trace import Call
from autopipe.errors import CaptureError

__all__ = ["Captured", "capture"]


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

    Takes the first of the ways in `autopipe.capture.fallbacks` that works and, where it is checked, computes what the
    model computes.

    Args:
        model: any module; its parameters may be on the meta device.
        args, kwargs: an example micro-batch.
        loss_fn, target: with them the loss is the last output of the graph.
        check: replay the micro-batch through model and graph and compare outputs, gradients and buffers. RNG state,
            buffers and gradients are put back. Left out for models on the meta device.

    Raises:
        CaptureError: no way works, or the graph does not compute what the model computes. The message names module,
            file and line.
    """
    call = Call(args=tuple(args), kwargs=dict(kwargs or {}), loss_fn=loss_fn, target=target)
    _check_signature(model, call)
    on_meta = any(p.device.type == "meta" for p in model.parameters())
    ways = recordings(model, call, on_meta)
    wrong: CaptureError | None = None
    while True:
        with preserved_state(model):
            seed_all()  # what is recorded of code that draws is the same on every rank and on every call
            captured = next(ways, None)
        if captured is None:
            assert wrong is not None
            raise wrong
        if not check or on_meta:
            return captured
        try:
            self_check(model, captured, call)
        except Unrepeatable:
            raise
        except CaptureError as cause:
            wrong = wrong or cause
        else:
            return captured


def _check_signature(model: nn.Module, call: Call) -> None:
    """Raises a CaptureError where `forward` cannot be called with these arguments at all."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a forward without a signature, such as a scripted one
        return
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as misfit:
        raise CaptureError(
            f"{type(model).__name__}.forward() called with {len(call.args)} arguments and the keywords "
            f"{sorted(call.kwargs)}: {misfit}",
            expected=f"arguments that fit {signature}",
            where=source_of(model, ""),
            remedy="pass the batch in the way in which the model takes it",
        ) from None
