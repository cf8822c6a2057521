"""Everything that differs between accelerators, over `torch.accelerator` and the device's own torch module.

The CPU is not an accelerator here. No other file names one: to support another, add its type to `SUPPORTED`, and change
here what it does differently.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

USUAL = "cuda"
"""The type that torch's own defaults name where no accelerator is there; ROCm devices have it too."""
SUPPORTED = (USUAL,)
"""Types that pipelines run on."""
EXAMPLES = f"{USUAL}, {USUAL}:1"
"""Devices as a user may write them, for help texts."""
VARIABLES = ("CUDA_VISIBLE_DEVICES",)
"""Environment variables that choose among devices."""


ERROR_WORDS = ("NCCL",)
"""Words in the errors of a process group over accelerators."""


# -- devices ----------------------------------------------------------------------------------------------------------


def kind() -> str | None:
    """The type of the accelerators of this machine; None if there are none, or of no supported type."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None or found.type not in SUPPORTED else found.type


@cache
def _built_for() -> str | None:
    """The type of accelerator that this torch was built for, which need not be there."""
    found = torch.accelerator.current_accelerator()
    return None if found is None else found.type


def is_accelerator(device: torch.device) -> bool:
    """Return whether a device is an accelerator: it has streams, events and memory of its own."""
    return device.type not in ("cpu", "meta")


def is_there(device: torch.device) -> bool:
    """Return whether this machine has devices of this type."""
    return not is_accelerator(device) or device.type == kind()


def devices() -> list[torch.device]:
    """The accelerators of this machine."""
    name = kind()
    return [] if name is None else [torch.device(name, i) for i in range(torch.accelerator.device_count())]


def device_of_rank(local_rank: int) -> torch.device:
    """The device of a process by its rank on this host; the CPU if there is no accelerator."""
    name = kind()
    return torch.device("cpu") if name is None else torch.device(name, local_rank)


def current_device() -> torch.device | None:
    """The accelerator that torch uses by default now; None if there is none."""
    name = kind()
    return None if name is None else torch.device(name, torch.accelerator.current_device_index())


def use(device: torch.device) -> None:
    """Make an accelerator the default of this process."""
    torch.accelerator.set_device_index(device)


def product_name(device: torch.device) -> str:
    """The name of the product, such as `NVIDIA H200`; the type if the accelerator's module does not tell it."""
    tell = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if tell is None else str(tell(device))


def memory_bytes(device: torch.device) -> int:
    """All memory of an accelerator."""
    return int(torch.get_device_module(device).get_device_properties(device).total_memory)


def runtime_version() -> str:
    """The version of the runtime that this torch was built for; empty for a CPU build."""
    return str(torch.version.cuda or torch.version.hip or getattr(torch.version, "xpu", None) or "")


# -- streams and events -----------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    torch.accelerator.synchronize(device)


def current_stream(device: torch.device) -> Any:
    """The stream that work on the device goes to now."""
    return torch.get_device_module(device).current_stream(device)


def new_stream(device: torch.device) -> Any:
    """A stream beside the current one, of high priority."""
    return torch.get_device_module(device).Stream(device, priority=-1)


def on_stream(device: torch.device, stream: Any) -> AbstractContextManager[Any]:
    """Work inside goes to this stream."""
    context: AbstractContextManager[Any] = torch.get_device_module(device).stream(stream)
    return context


def keep_for(tensor: Tensor, stream: Any) -> None:
    """Keep the memory of a tensor until a stream has passed what it has now."""
    tensor.record_stream(stream)


def timing_event(device: torch.device) -> Any:
    """An event on the current stream: has `synchronize()` and `elapsed_time(end)` in milliseconds."""
    event = torch.get_device_module(device).Event(enable_timing=True)
    event.record(current_stream(device))
    return event


# -- memory -----------------------------------------------------------------------------------------------------------


def allocated_bytes(device: torch.device) -> int:
    """Bytes that torch's allocator has given out on an accelerator."""
    return int(torch.get_device_module(device).memory_allocated(device))


def peak_bytes(device: torch.device) -> int:
    """The most that it has given out since the start, or since `reset_peak`."""
    return int(torch.get_device_module(device).max_memory_allocated(device))


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of the peak."""
    torch.get_device_module(device).reset_peak_memory_stats(device)


# -- random state and autocast ----------------------------------------------------------------------------------------


def fork_rng(devices: list[torch.device]) -> AbstractContextManager[None]:
    """The random state of the CPU and of these accelerators is restored when the context ends."""
    of_type = devices[0].type if devices else USUAL
    kept: AbstractContextManager[None] = torch.random.fork_rng(devices, device_type=of_type)
    return kept


def seed_current(seed: int) -> None:
    """Seed the generator of the current accelerator, if this process has used one."""
    name = _built_for()
    if name not in SUPPORTED:
        return
    module = torch.get_device_module(name)
    if module.is_initialized():
        module.default_generators[module.current_device()].manual_seed(seed)


def autocast_types() -> tuple[str, ...]:
    """The device types whose autocast state a graph may change."""
    return ("cpu", _built_for() or USUAL)


# -- process groups ---------------------------------------------------------------------------------------------------


def backend(device: torch.device) -> str:
    """The process-group backend for tensors on a device."""
    return str(dist.get_default_backend_for_device(device.type))


def device_of_group(group: dist.ProcessGroup | None) -> torch.device:
    """The device whose tensors a process group sends: the current accelerator, or the CPU."""
    here, cpu = current_device(), torch.device("cpu")
    if here is None or backend(here) == backend(cpu):
        return cpu
    return here if backend(here) in dist.get_backend(group) else cpu


def backends() -> list[str]:
    """The backends that this torch has, with their versions if known."""
    if not dist.is_available():
        return []
    found = ["gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available():
        found.append(f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}")  # type: ignore[no-untyped-call]
    return found
