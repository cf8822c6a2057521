"""Device and inputs of a measurement: the device, and a value for every placeholder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from profiler import accelerator
from profiler.errors import ProfileError
from profiler.tensors import has_values, on_device


def find_device(model: fx.GraphModule, args: Sequence[Any], device: torch.device | str | None) -> torch.device:
    """The device to measure on: the given one, else that of the first tensor with values, else the CPU.

    Raises:
        ProfileError: there is no such device here.
    """
    if device is None:
        tensors = [*model.parameters(), *model.buffers(), *(a for a in args if isinstance(a, Tensor))]
        return next((t.device for t in tensors if has_values(t)), torch.device("cpu"))
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("`meta` computes nothing")
        torch.empty(1, device=found).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        reason = str(cause).strip().splitlines()[0].rstrip(".")
        raise ProfileError(
            f"device {str(device)!r}, which cannot be used here ({reason})",
            expected=f"one of {', '.join(_devices_here())}",
            where="device",
            remedy="profile where that device is, or estimate without it: profiler.estimate(..., device='h100')",
        ) from None
    return found


def _devices_here() -> list[str]:
    return ["cpu", *map(str, accelerator.devices())]


def device_name(device: torch.device) -> str:
    """A device's name as a profile holds it: `cpu`, or the product name of a GPU."""
    return accelerator.product_name(device) if accelerator.is_accelerator(device) else device.type


def dtype_name(model: fx.GraphModule) -> str:
    """Name of the dtype that most of the parameters' elements have; the default dtype without parameters."""
    counts: dict[torch.dtype, int] = {}
    for p in model.parameters():
        counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    dtype = max(counts, key=lambda d: counts[d]) if counts else torch.get_default_dtype()
    return str(dtype).removeprefix("torch.")


def input_values(model: fx.GraphModule, args: Sequence[Any]) -> list[Any]:
    """One value for each placeholder: the given ones, or what capture noted of their shapes.

    Raises:
        ProfileError: too many or too few.
    """
    placeholders = [n for n in model.graph.nodes if n.op == "placeholder"]
    if len(args) == len(placeholders):
        return list(args)
    noted = [n.meta.get("val", n.meta.get("example_value", n.args[0] if n.args else None)) for n in placeholders]
    if args or any(v is None and "val" not in n.meta for v, n in zip(noted, placeholders, strict=True)):
        names = ", ".join(n.name for n in placeholders) or "none"
        raise ProfileError(
            f"{len(args)} input values",
            expected=f"{len(placeholders)} ({names})",
            where="args",
            remedy="give one value for each placeholder of the graph, in order",
        )
    return noted


def place(value: Any, device: torch.device) -> Any:
    """An input on the device, as a copy that the graph may write to; made up where it has no values."""
    if not isinstance(value, Tensor):
        return value
    made = on_device(value, device)
    if has_values(value) and made.data_ptr() == value.data_ptr():
        made = made.clone()
    return made.requires_grad_(value.requires_grad)


def microbatch_size(inputs: Sequence[Any]) -> int:
    """Size of the first dimension of the first input that has one."""
    return next((int(v.shape[0]) for v in inputs if isinstance(v, Tensor) and v.dim() and v.shape[0]), 1)
