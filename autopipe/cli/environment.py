"""What a bug report needs: versions, devices, backends and cores of this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform

import torch
import torch.distributed as dist

from autopipe.report.tables import Column, Document, Table, render

PACKAGES = ("torch-autopipe", "torch", "numpy", "tabulate", "tqdm", "transformers", "safetensors")
VARIABLES = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "AUTOPIPE_CACHE_DIR",
    "AUTOPIPE_COUNT_MEMORY",
    "AUTOPIPE_HEARTBEAT_S",
    "AUTOPIPE_SHARED_MEMORY",
)
"""Variables that change a run; a test compares them with those that the source reads."""


def environment_report(format: str = "table") -> str:
    """The environment as `table` or `json`."""
    found = environment()
    if format == "json":
        return json.dumps(found, indent=1) + "\n"
    columns = (Column(name="what"), Column(name="here"))
    table = Table(title="", columns=columns, rows=tuple(found.items()))
    return render(Document(title="Environment", parts=(table,)), format)


def environment() -> dict[str, str]:
    """What is here, by name; `not installed`, `none` and `not set` where it is not."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found.update({name: _version(name) for name in PACKAGES})
    found["cores"] = f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"
    found["torch threads"] = str(torch.get_num_threads())
    found["CUDA devices"] = _devices()
    found["backends"] = ", ".join(_backends()) or "none"
    found.update({name: os.environ.get(name, "not set") for name in VARIABLES})
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        names.append(f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
    return "; ".join(names)


def _backends() -> list[str]:
    if not dist.is_available():
        return []
    found = ["gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available():
        found.append(f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}")  # type: ignore[no-untyped-call]
    return found
