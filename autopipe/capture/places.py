"""Places in a model's code: file and line, and what can be kept whole: a module, by its name, and a method of a module, as `name:method`."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from autopipe.capture.compat import is_torch_file

_PREFIX = "_autopipe_method_"


def is_method(target: Any) -> bool:
    """Whether a `call_module` node calls a method that is kept whole."""
    return isinstance(target, str) and target.startswith(_PREFIX)


class MethodModule(nn.Module):
    """Calls a method of a module that reads none of the model's parameters, as a module of its own in the graph."""

    def __init__(self, owner: nn.Module, method: str) -> None:
        super().__init__()
        self._owner, self._method = (owner,), method  # in a tuple: the owner's parameters are not this module's
        self.training = owner.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner[0]
        before, owner.training = owner.training, self.training
        try:
            return getattr(type(owner), self._method)(owner, *args, **kwargs)
        finally:
            owner.training = before


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


def source_line() -> str:
    """File and line of the innermost frame outside torch and autopipe."""
    frame = sys._getframe(1)
    while frame is not None and is_internal(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


_OWN_DIR = __file__.rpartition("/")[0] + "/"


def is_internal(filename: str) -> bool:
    return is_torch_file(filename) or filename.startswith((_OWN_DIR, "<")) or "contextlib" in filename
