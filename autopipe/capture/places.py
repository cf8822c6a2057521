"""Places in a model's code: file and line, and what can be kept whole: a module, by its name, and a method of a module,
as `name:method`."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autopipe.capture.compat import is_torch_file
from autopipe.capture.objects import tensors_inside

_PREFIX = "_autopipe_method_"


def is_method(target: Any) -> bool:
    """Whether a `call_module` node calls a method that is kept whole."""
    return isinstance(target, str) and target.startswith(_PREFIX)


class MethodModule(nn.Module):
    """Calls a method of a module as a module of its own in the graph.

    Attributes:
        names: the owner's parameters and buffers that the method reads; their values are the first argument of the
            call.
    """

    names: tuple[str, ...] = ()

    def __init__(self, owner: nn.Module, method: str) -> None:
        super().__init__()
        self._owner, self._method = (owner,), method  # in a tuple: the owner's parameters are not this module's
        self.training = owner.training

    def forward(self, values: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        holders = [self._holder(name) for name in self.names]
        before = [holder[field] for holder, field in holders]
        try:
            for (holder, field), value in zip(holders, values, strict=True):
                holder[field] = value
            return self.call_plainly(*args, **kwargs)
        finally:
            for (holder, field), tensor in zip(holders, before, strict=True):
                holder[field] = tensor

    def call_plainly(self, *args: Any, **kwargs: Any) -> Any:
        """Calls it with the parameters that the owner has."""
        owner = self._owner[0]
        before, owner.training = owner.training, self.training
        try:
            return getattr(type(owner), self._method)(owner, *args, **kwargs)
        finally:
            owner.training = before

    def _holder(self, name: str) -> tuple[dict[str, Any], str]:
        path, _, field = name.rpartition(".")
        module = self._owner[0].get_submodule(path)
        return (module._parameters if field in module._parameters else module._buffers), field


class AttributesRead(TorchFunctionMode):
    """Notes which parameters and buffers of a module torch calls read, by name."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, Tensor] = {}
        self._names = {id(t): n for n, t in [*owner.named_parameters(), *owner.named_buffers()]}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_inside((args, kwargs or {})):
            if id(tensor) in self._names:
                self.found[self._names[id(tensor)]] = tensor
        return func(*args, **(kwargs or {}))


def method_target(place: str) -> str:
    """The name of a method's module in the graph."""
    return _PREFIX + place.replace(".", "_").replace(":", "_")


class Places:
    """Finds the method of the model in which code runs, or failed."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(m): name for name, m in reversed(list(model.named_modules(remove_duplicate=False)))}

    def method_in(self, cause: BaseException) -> str | None:
        """The innermost method in which an exception arose, None where a forward is further in."""
        frames = []
        tb = cause.__traceback__
        while tb is not None:
            frames.append(tb.tb_frame)
            tb = tb.tb_next
        return self._innermost(reversed(frames))

    def method_now(self) -> str | None:
        """The innermost method that runs now."""
        return self._innermost(_stack())

    def _innermost(self, frames: Iterator[types.FrameType]) -> str | None:
        for frame in frames:
            owner = frame.f_locals.get("self")
            if id(owner) not in self._names or is_torch_file(frame.f_code.co_filename):
                continue
            name = frame.f_code.co_name
            if name == "forward":
                return None
            if isinstance(inspect.getattr_static(type(owner), name, None), types.FunctionType):
                return f"{self._names[id(owner)]}:{name}"
        return None


def _stack() -> Iterator[types.FrameType]:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def source_of(model: nn.Module, name: str) -> str:
    """A module of the model in words: name, class, file and line of its forward."""
    module = model.get_submodule(name)
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    line = f", {code.co_filename}:{code.co_firstlineno}" if code is not None else ""
    return f"module {name!r} ({type(module).__name__}){line}"


def source_line() -> str:
    """File and line of the innermost frame outside torch and autopipe."""
    frame = sys._getframe(1)
    while frame is not None and is_internal(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


_OWN_DIR = __file__.rpartition("/")[0] + "/"


def is_internal(filename: str) -> bool:
    return is_torch_file(filename) or filename.startswith((_OWN_DIR, "<")) or "contextlib" in filename
