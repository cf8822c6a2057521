"""Hooks on the whole model: nodes of the graph before its first and after its last, in which the user's functions run
at every micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autopipe.capture.compat import without_torch_function
from autopipe.capture.opaque import real_like
from autopipe.capture.reading import Untraceable
from autopipe.capture.recorder import Recorder


def call_with_hooks(
    recorder: Recorder, model: nn.Module, args: Any, kwargs: Any, fake_mode: FakeTensorMode | None
) -> Any:
    """Calls the model's forward between its hooks, each kind of hook recorded as one node.

    Raises:
        Untraceable: a backward hook on the whole model, which has no place in a stage.
    """
    if model._backward_hooks or model._backward_pre_hooks:
        raise Untraceable("a backward hook on the whole model; put it on a submodule")

    def record(function: Callable[..., Any], *given: Any) -> Any:
        def run() -> Any:
            with without_torch_function():
                if fake_mode is None:
                    return function(*given)
                return real_like(lambda a, _: function(*a), given, {}, fake_mode)

        out = recorder.record("call_function", function, given, {}, run)
        next(iter(reversed(recorder.graph.nodes))).meta["effect"] = True
        return out

    if model._forward_pre_hooks:
        args, kwargs = record(_before(model), args, kwargs)
    out = model.forward(*args, **kwargs)
    return record(_after(model), args, kwargs, out) if model._forward_hooks else out


def _before(model: nn.Module) -> Callable[..., Any]:
    def run_forward_pre_hooks(args: Any, kwargs: Any) -> Any:
        for key, hook in model._forward_pre_hooks.items():
            if key in model._forward_pre_hooks_with_kwargs:
                changed = hook(model, args, kwargs)
                args, kwargs = (args, kwargs) if changed is None else changed
            else:
                changed = hook(model, args)
                args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
        return args, kwargs

    return run_forward_pre_hooks


def _after(model: nn.Module) -> Callable[..., Any]:
    def run_forward_hooks(args: Any, kwargs: Any, out: Any) -> Any:
        for key, hook in model._forward_hooks.items():
            with_kwargs = key in model._forward_hooks_with_kwargs
            changed = hook(model, args, kwargs, out) if with_kwargs else hook(model, args, out)
            out = out if changed is None else changed
        return out

    return run_forward_hooks
