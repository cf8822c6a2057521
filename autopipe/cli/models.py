"""Load the model and the example batch that a command line names."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from autopipe.errors import ConfigError

RETURNS = "(model, example_args) or (model, example_args, example_kwargs)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A model and how it is called with a whole batch."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def load_example(name: str) -> Example:
    """Call the factory that `package.module:factory` or `file.py:factory` names.

    Raises:
        ConfigError: no such module, file or factory, or the factory returns something else. What the user's own code
            raises comes through as it is.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise _wrong(f"model {name!r}", "package.module:factory or file.py:factory", name)
    module = _from_file(Path(place), name) if place.endswith(".py") else _from_package(place, name)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        has = f"; it has {', '.join(names)}" if names else ""
        raise _wrong(f"no function {attribute!r} in {place}{has}", "a factory", name)
    return _checked(factory, name)


def load_parts(name: str) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]:
    """Return what `load_example` returns as one tuple: model, args, kwargs."""
    example = load_example(name)
    return example.model, example.args, example.kwargs


def _from_file(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise _wrong(f"no file {str(path)!r}", "a Python file", name)
    sys.path.insert(0, str(path.parent.resolve()))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _from_package(package: str, name: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or not (package == error.name or package.startswith(f"{error.name}.")):
            raise
        raise _wrong(f"no module {error.name!r}", "a module that Python can import", name) from None


def _checked(factory: Callable[[], Any], name: str) -> Example:
    made = factory()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        got = f"({', '.join(type(v).__name__ for v in made)})" if isinstance(made, tuple) else type(made).__name__
        raise _wrong(f"a factory that returns {got}", RETURNS, name)
    model, args, kwargs = made if len(made) == 3 else (*made, {})
    if not isinstance(args, (tuple, list)):
        args = (args,)
    if not isinstance(kwargs, Mapping):
        raise _wrong(f"example_kwargs of type {type(kwargs).__name__}", "a dictionary", name)
    return Example(model=model, args=tuple(args), kwargs=kwargs)


def _wrong(got: str, expected: str, name: str) -> ConfigError:
    return ConfigError(
        got,
        expected=expected,
        where=name,
        remedy=f"name a function that takes nothing and returns {RETURNS}, such as train.py:build",
    )
