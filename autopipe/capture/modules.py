"""Recording of module calls: torch.nn leaves and opaque modules as one node, all others by what their forward
calls."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointFunction

from autopipe.capture.compat import (
    compiled_original,
    is_scripted,
    patched_checkpoint,
    patched_function_apply,
    patched_vmap,
    without_torch_function,
)
from autopipe.capture.hooks import call_with_hooks
from autopipe.capture.objects import closed_over, closed_over_others, map_tensors
from autopipe.capture.opaque import materialise, run_module, what_varies
from autopipe.capture.places import AttributesRead, MethodModule, method_target
from autopipe.capture.reading import Varies
from autopipe.capture.recorder import Recorder

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_TRAVERSED = ("torch.nn.modules.transformer", "torch.nn.modules.module", "torch.nn.utils")


def has_hooks(module: nn.Module) -> bool:
    """Whether user code hangs on calls of the module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_leaf(module: nn.Module) -> bool:
    """Whether the module is one of torch's own layers, which stays a `call_module` node."""
    home = type(module).__module__
    return (
        home.startswith("torch.nn.")
        and not home.startswith(_TRAVERSED)
        and not isinstance(module, _CONTAINERS)
        and not parametrize.is_parametrized(module)
    )


class ModuleCalls:
    """Records the module calls of `model` into `recorder`; on a failure `failed` names the innermost module that ran.

    Args:
        opaque: FQNs of modules that are kept whole, although they are not leaves.
        originals: the model's real parameters and buffers by every name, for running opaque modules.
        fake_mode: None where the model is recorded on real tensors.
    """

    def __init__(
        self,
        recorder: Recorder,
        model: nn.Module,
        opaque: frozenset[str],
        originals: dict[str, Tensor],
        fake_mode: FakeTensorMode | None,
    ) -> None:
        self.failed: str | None = None
        self._recorder, self._opaque, self._originals, self._fake_mode = recorder, opaque, originals, fake_mode
        self._names = {id(m): name for name, m in reversed(list(model.named_modules(remove_duplicate=False)))}
        self._next_region = 0
        self._outer_regions: list[int | None] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """While open, calls of modules, autograd functions and checkpoints are seen."""
        original = nn.Module.__call__
        calls = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return calls._call(original, module, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            with (
                patched_function_apply(self._apply),
                patched_vmap(self._vmap),
                patched_checkpoint(self._enter_checkpoint, self._leave_checkpoint),
            ):
                yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    def _call(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        recorder, name = self._recorder, self._names.get(id(module))
        if recorder.inside or name is None:
            return original(module, *args, **kwargs)
        if (inner := compiled_original(module)) is not None:
            return self._call(original, inner, args, kwargs)
        recorder.check_python_random()  # what was drawn before is the caller's
        previous = recorder.module_stack
        recorder.module_stack = {**previous, name: (name, type(module))}
        try:
            if name and (name in self._opaque or has_hooks(module) or is_scripted(module)):
                return self._as_one_node(original, module, name, args, kwargs)
            if name and is_leaf(module) and self._holds_its_own(module, name):
                return self._as_one_node(original, module, name, args, kwargs)
            if not name and has_hooks(module):
                out = call_with_hooks(recorder, module, args, kwargs, self._fake_mode)
            else:
                out = original(module, *args, **kwargs)
            recorder.check_python_random()
            return out
        except Exception:
            self.failed = self.failed or name
            raise
        finally:
            recorder.module_stack = previous

    def _holds_its_own(self, module: nn.Module, name: str) -> bool:
        """Whether the module holds the model's parameters now, and not tensors that were put in their place."""
        own = [*module.named_parameters(), *module.named_buffers()]
        return all(
            self._recorder.is_attribute(t) or n not in self._originals for n, t in ((f"{name}.{n}", t) for n, t in own)
        )

    def _as_one_node(self, original: Callable[..., Any], module: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
        def run() -> Any:
            with without_torch_function():
                if (name in self._opaque or is_scripted(module)) and self._fake_mode is not None:
                    return self._run_on_real_tensors(original, module, name, args, kwargs)
                return original(module, *args, **kwargs)

        own = [*module.parameters(), *module.buffers()]
        whole = name in self._opaque and self._fake_mode is None

        def varies(out: Any) -> Varies:
            return what_varies(lambda *a, **k: original(module, *a, **k), module, args, kwargs, out)

        state = random.getstate(), np.random.get_state()
        try:
            return self._recorder.record(
                "call_module", name, args, kwargs, run, reads=own, varies=varies if whole else None
            )
        finally:  # what a module that is kept whole draws, it draws again at every run
            _set_python_random(state)

    @contextlib.contextmanager
    def whole_methods(self, model: nn.Module) -> Iterator[dict[str, nn.Module]]:
        """While open, calls of the methods among the places kept whole are one node each; gives the modules that these
        nodes name."""
        found = dict[str, nn.Module]()
        for place in sorted(p for p in self._opaque if ":" in p):
            name, _, method = place.partition(":")
            owner = model.get_submodule(name)
            module = MethodModule(owner, method)
            found[method_target(place)] = module
            owner.__dict__[method] = self._whole_method(method_target(place), module, owner)
        yield found  # `trace` puts back what was assigned to attributes

    def _whole_method(self, target: str, module: MethodModule, owner: nn.Module) -> Callable[..., Any]:
        recorder = self._recorder

        def call(*args: Any, **kwargs: Any) -> Any:
            if recorder.inside:
                return module.call_plainly(*args, **kwargs)
            state = random.getstate(), np.random.get_state()
            values = self._attributes_read(module, owner, args, kwargs)
            _set_python_random(state)

            def varies(out: Any) -> Varies:
                return what_varies(module.forward, owner, (values, *args), kwargs, out)

            def run() -> Any:
                with without_torch_function():
                    return module.forward(values, *args, **kwargs)

            try:
                return recorder.record("call_module", target, (values, *args), kwargs, run, varies=varies)
            finally:
                _set_python_random(state)

        return call

    def _attributes_read(self, module: MethodModule, owner: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
        """Tells the method's module which parameters and buffers of its owner it reads; gives their values."""
        reads = AttributesRead(owner)
        args, kwargs = map_tensors(lambda t: t.detach().clone(), (args, kwargs))
        buffers = [(b, b.detach().clone()) for b in owner.buffers()]
        self._recorder.inside += 1
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), reads:
                module.call_plainly(*args, **kwargs)
                for buffer, value in buffers:
                    buffer.copy_(value)
        finally:
            self._recorder.inside -= 1
        module.names = tuple(reads.found)
        return list(reads.found.values())

    def _run_on_real_tensors(
        self, original: Callable[..., Any], module: nn.Module, name: str, args: Any, kwargs: Any
    ) -> Any:
        """Runs a module whose Python reads values on made-up inputs of the right shapes, to learn the shape of its
        output."""
        assert self._fake_mode is not None
        parameters = [n for n, _ in module.named_parameters(remove_duplicate=False)]
        buffers = [n for n, _ in module.named_buffers(remove_duplicate=False)]
        with unset_fake_temporarily():
            real = {n: materialise(self._originals[f"{name}.{n}"]) for n in parameters}
            real |= {n: materialise(self._originals[f"{name}.{n}"]).clone() for n in buffers}
        return run_module(original, module, real, args, kwargs, self._fake_mode)

    def _apply(self, base: Callable[..., Any]) -> Callable[..., Any]:
        def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            recorder = self._recorder
            if recorder.inside:
                return base(cls, *args, **kwargs)
            if cls is CheckpointFunction:  # reentrant: (run function, preserve RNG state, *inputs)
                self._enter_checkpoint()
                try:
                    return args[0](*args[2:])
                finally:
                    self._leave_checkpoint()

            def run() -> Any:
                with without_torch_function():
                    return base(cls, *args, **kwargs)

            return recorder.record("call_function", applier(cls), args, kwargs, run)

        return apply

    def _vmap(
        self, base: Callable[..., Any], function: Callable[..., Any], options: Any, args: Any, kwargs: Any
    ) -> Any:
        """A function under `torch.vmap` is one node, to which the tensors that it is closed over are given too."""
        tensors = None if self._recorder.inside else closed_over(function)
        if tensors is None:
            return base(function, *options, *args, **kwargs)

        def call_vmap(tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
            return base(closed_over_others(function, tensors), *options, *args, **kwargs)

        def run() -> Any:
            with without_torch_function():
                return call_vmap(tensors, *args, **kwargs)

        return self._recorder.record("call_function", call_vmap, (tensors, *args), kwargs, run)

    def _enter_checkpoint(self) -> None:
        if not self._recorder.inside:
            self._outer_regions.append(self._recorder.checkpoint_region)
            if self._recorder.checkpoint_region is None:  # an inner region is computed again with the outer one
                self._recorder.checkpoint_region = self._next_region
                self._next_region += 1

    def _leave_checkpoint(self) -> None:
        if not self._recorder.inside:
            self._recorder.checkpoint_region = self._outer_regions.pop()


def _set_python_random(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])


_APPLIERS: dict[type, Callable[..., Any]] = {}


def applier(cls: type) -> Callable[..., Any]:
    """A function that fx can call for a custom `torch.autograd.Function`."""
    if cls not in _APPLIERS:

        def apply(*args: Any, **kwargs: Any) -> Any:
            return cls.apply(*args, **kwargs)  # type: ignore[attr-defined]

        apply.__name__ = apply.__qualname__ = f"apply_{cls.__name__}"
        apply.__module__ = cls.__module__
        _APPLIERS[cls] = apply
    return _APPLIERS[cls]
