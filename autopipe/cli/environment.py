"""Versions, devices, backends and cores of this machine, for a bug report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform

import torch

from autopipe.report.tables import Column, Document, Table, render
from profiler import accelerator

PACKAGES = ("torch-autopipe", "torch", "numpy", "tabulate", "tqdm", "transformers", "safetensors")
VARIABLES = (
    "OMP_NUM_THREADS",
    *accelerator.VARIABLES,
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
    """Facts of this machine by name; `not installed`, `none` or `not set` if there is no such thing."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found.update({name: _version(name) for name in PACKAGES})
    found["cores"] = f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"
    found["torch threads"] = str(torch.get_num_threads())
    found["accelerators"] = _devices()
    found["backends"] = ", ".join(accelerator.backends()) or "none"
    found.update({name: os.environ.get(name, "not set") for name in VARIABLES})
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    found = accelerator.devices()
    sizes = [f"{accelerator.product_name(d)}, {accelerator.memory_bytes(d) / 2**30:.0f} GiB" for d in found]
    return "; ".join(sizes) or "none"
