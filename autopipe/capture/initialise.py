"""The model's own initialisation, run so that a parameter's values depend on the seed and its name, and not on which
others are there."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autopipe.capture.compat import storage_key
from autopipe.capture.seeding import generators_kept
from autopipe.errors import ConfigError

_UNSET = -(2**31) + 12345  # no initialisation gives an integer buffer this value


def initialise(model: nn.Module, names: Collection[str], seed: int) -> None:
    """Runs the initialisation of every module that holds one of these tensors, children first.

    Other tensors, on the meta device or with values, are left as they are: the meta ones take part without effect.

    Raises:
        ConfigError: a tensor got no value.
    """
    if not names:
        return
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    ours = {n: tensors[n] for n in names}
    with torch.no_grad(), generators_kept():
        for value in ours.values():
            value.fill_(
                float("nan") if value.is_floating_point() or value.is_complex() else _UNSET if _wide(value) else 0
            )
        held = {id(t) for t in ours.values()}  # a tied tensor has other names too
        untouched = [(t, t.detach().clone()) for t in tensors.values() if id(t) not in held and t.device.type != "meta"]
        with _SeededByName(ours, seed) as draws:
            for name, module in reversed(list(model.named_modules())):
                if (reset := _reset_of(model, module)) is not None and _holds(module, ours):
                    draws.module = name
                    reset()
        for tensor, before in untouched:
            tensor.copy_(before)
    for name, value in ours.items():
        if _is_unset(value):
            raise ConfigError(
                f"no code of the model gives a value to {name!r}",
                expected="a module with reset_parameters(), or a model with _init_weights(module)",
                where=f"{type(model.get_submodule(name.rpartition('.')[0])).__name__}",
                remedy="give the module a reset_parameters() that fills its parameters and buffers, or give a state "
                "dict",
            )


def _wide(value: Tensor) -> bool:
    return value.dtype in (torch.int32, torch.int64)


def _is_unset(value: Tensor) -> bool:
    if value.is_floating_point() or value.is_complex():
        return bool(torch.isnan(value).any())
    return _wide(value) and bool((value == _UNSET).any())


def _holds(module: nn.Module, ours: dict[str, Tensor]) -> bool:
    held = {id(t) for t in ours.values()}
    return any(id(t) in held for t in [*module.parameters(), *module.buffers()])


def _reset_of(model: nn.Module, module: nn.Module) -> Callable[[], Any] | None:
    """The function that initialises a module: transformers' `_init_weights` of the model where it has one, else its own
    `reset_parameters`."""
    of_model = getattr(model, "_init_weights", None)
    if callable(of_model):
        return lambda: of_model(module)
    for name in ("reset_parameters", "_reset_parameters", "init_weights"):
        reset: Callable[[], Any] | None = getattr(module, name, None)
        if callable(reset) and name in _methods(module):
            return reset
    return None


def _methods(module: nn.Module) -> set[str]:
    return {n for cls in type(module).__mro__ if cls is not nn.Module for n in vars(cls)}


class _SeededByName(TorchDispatchMode):
    """Seeds the generator before every operator that draws: by the name of the tensor it fills, else by the module that
    runs."""

    def __init__(self, tensors: dict[str, Tensor], seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module = ""
        self._seed = seed
        self._names = {storage_key(t): name for name, t in tensors.items()}
        self._draws: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            target = args[0] if args and isinstance(args[0], Tensor) else None
            on_meta = target is not None and target.device.type == "meta"
            if not on_meta:
                name = self._names.get(storage_key(target)) if target is not None else None
                self._seed_for(name or f"module {self.module}")
        return func(*args, **(kwargs or {}))

    def _seed_for(self, what: str) -> None:
        number = self._draws[what] = self._draws.get(what, -1) + 1
        torch.manual_seed(self._seed * 0x9E3779B1 + zlib.crc32(f"{what}#{number}".encode()) & (1 << 62) - 1)
