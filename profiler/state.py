"""Restores everything that a measurement may disturb: random states, grad and autocast modes, attributes of modules."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from profiler import accelerator

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@contextmanager
def preserved(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Runs a block, then restores the random states, the modes and the plain attributes of the model's modules.

    Parameters, buffers and gradients need no restoring: nodes run on detached aliases and copies (see `tensors.py`).
    """
    python, numpy = random.getstate(), sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy is not None else None
    attributes = [(m, _plain_attributes(m)) for m in model.modules()]
    devices = [device] if accelerator.is_accelerator(device) else []
    with accelerator.fork_rng(devices), preserved_modes():
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(arrays)
            for module, before in attributes:
                _restore_attributes(module, before)


@contextmanager
def preserved_modes() -> Iterator[None]:
    """Restores grad mode and autocast however the block ends: a graph may fail between `enter` and `exit`."""
    grad = torch.is_grad_enabled()
    torch.autocast_increment_nesting()
    depth = torch.autocast_decrement_nesting()
    states = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in accelerator.autocast_types()}
    cached = torch.is_autocast_cache_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_autocast_cache_enabled(cached)
        for name, (enabled, dtype) in states.items():
            torch.set_autocast_enabled(name, enabled)
            torch.set_autocast_dtype(name, dtype)
        torch.clear_autocast_cache()
        torch.autocast_increment_nesting()
        while torch.autocast_decrement_nesting() > depth:
            pass


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in _REGISTRIES}


def _restore_attributes(module: nn.Module, before: Mapping[str, Any]) -> None:
    now = vars(module)
    for name in [k for k in now if k not in before and k not in _REGISTRIES]:
        del now[name]
    now.update(before)


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other tensors under the names of its parameters and buffers, for the length of a block.

    Args:
        module: the module.
        tensors: dotted names relative to `module`, each with the tensor to stand there.
    """
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            registry = owner._parameters if leaf in owner._parameters else owner._buffers
            replaced.append((registry, leaf, registry[leaf]))
            registry[leaf] = tensor  # type: ignore[assignment]
        yield
    finally:
        for registry, leaf, before in replaced:
            registry[leaf] = before
