"""How module calls are recorded: torch.nn leaves and opaque modules as one node, all others by what their forward calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from autopipe.capture.compat import patched_checkpoint, patched_function_apply, without_torch_function
from autopipe.capture.recorder import Recorder, Untraceable

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
                patched_checkpoint(self._enter_checkpoint, self._leave_checkpoint),
            ):
                yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    def _call(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        recorder, name = self._recorder, self._names.get(id(module))
        if recorder.inside or name is None:
            return original(module, *args, **kwargs)
        previous = recorder.module_stack
        recorder.module_stack = {**previous, name: (name, type(module))}
        try:
            if name and (name in self._opaque or has_hooks(module) or is_leaf(module)):
                return self._as_one_node(original, module, name, args, kwargs)
            if not name and has_hooks(module):
                raise Untraceable("a hook on the whole model")
            return original(module, *args, **kwargs)
        except Exception:
            self.failed = self.failed or name
            raise
        finally:
            recorder.module_stack = previous

    def _as_one_node(self, original: Callable[..., Any], module: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
        def run() -> Any:
            with without_torch_function():
                if name in self._opaque and self._fake_mode is not None:
                    return self._run_on_real_tensors(module, name, args, kwargs)
                return original(module, *args, **kwargs)

        own = [*module.parameters(), *module.buffers()]
        return self._recorder.record("call_module", name, args, kwargs, run, reads=own)

    def _run_on_real_tensors(self, module: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
        """Runs a module whose Python reads values on made-up inputs of the right shapes, to learn the shape of its output."""
        assert self._fake_mode is not None
        parameters = [n for n, _ in module.named_parameters(remove_duplicate=False)]
        buffers = [n for n, _ in module.named_buffers(remove_duplicate=False)]
        with unset_fake_temporarily():
            real = {n: _materialise(self._originals[f"{name}.{n}"]) for n in parameters}
            real |= {n: _materialise(self._originals[f"{name}.{n}"]).clone() for n in buffers}
        own_grad = any(p.requires_grad for p in module.parameters())
        return real_like(
            lambda a, k: torch.func.functional_call(module, real, a, k, tie_weights=False),
            args,
            kwargs,
            self._fake_mode,
            own_grad,
        )

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

    def _enter_checkpoint(self) -> None:
        if not self._recorder.inside:
            self._recorder.checkpoint_region = self._next_region
            self._next_region += 1

    def _leave_checkpoint(self) -> None:
        if not self._recorder.inside:
            self._recorder.checkpoint_region = None


def real_like(
    function: Callable[[Any, Any], Any], args: Any, kwargs: Any, fake_mode: FakeTensorMode, own_grad: bool = False
) -> Any:
    """The fake twin of what `function(args, kwargs)` gives on real tensors of the same shapes, made up.

    Which path the function takes depends on the values, so its floating-point outputs count as differentiable wherever an
    input is, or where `own_grad` says that it has trained parameters of its own.
    """
    grad = torch.is_grad_enabled() and (
        own_grad or any(t.requires_grad for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    )
    with unset_fake_temporarily():
        out = function(*pytree.tree_map_only(Tensor, _materialise, (args, kwargs)))

    def fake(t: Tensor) -> Tensor:
        differentiable = grad and (t.is_floating_point() or t.is_complex())
        return fake_mode.from_tensor(t.detach().requires_grad_(differentiable), static_shapes=True)

    return pytree.tree_map_only(Tensor, fake, out)


def _materialise(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, FakeTensor) and tensor.device.type != "meta":
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        value = torch.randn(tensor.shape, dtype=tensor.dtype, device=_real_device(tensor)).requires_grad_(
            tensor.requires_grad
        )
        return value if tensor.is_leaf or not tensor.requires_grad else value.clone()
    return torch.ones(tensor.shape, dtype=tensor.dtype, device=_real_device(tensor))


def _real_device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


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
