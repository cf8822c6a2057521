"""Measurements kept on disk: one small JSON file for each node signature, device, torch version and number of
threads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from profiler import accelerator
from profiler.inputs import device_name
from profiler.nodes import TRIVIAL_US, Timing
from profiler.signature import Signature
from profiler.trace import TensorOutput, Trace
from profiler.walk import Record

CACHE_SCHEMA = "autopipe.node-cost/1"
SETTLED = 4.0
"""An entry is used where its spread is within this many times the relative error that is asked for."""
_LOG = logging.getLogger("autopipe.profiler")


def cache_dir() -> Path:
    """`AUTOPIPE_CACHE_DIR`, else `autopipe` in the user's cache directory (XDG base directory specification)."""
    given = os.environ.get("AUTOPIPE_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "autopipe"


def environment(device: torch.device) -> dict[str, Any]:
    """Conditions of a measurement besides its signature: it is written into each entry and compared on reading."""
    return {
        "device": f"cpu {_cpu_model()}" if device.type == "cpu" else device_name(device),
        "torch": torch.__version__,
        "runtime": accelerator.runtime_version(),
        "threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), os.uname().machine)


class DiskRecords:
    """Records of signatures: those of this profile in memory, those of earlier ones on disk.

    An entry is trusted only if it is whole (its digest fits), is for this signature, device, torch and threads, and is
    as exact as asked for now; otherwise the node is measured again. Nodes that run the user's own code are never
    written: it may change.

    Args:
        device: where nodes are measured.
        relative_error: that of the profile.
        folder: where entries are; None for memory only.
        num_together: processes of this host that measure at the same time.
    """

    def __init__(self, device: torch.device, relative_error: float, folder: Path | None, num_together: int = 1) -> None:
        self._records: dict[str, Record] = {}
        self._environment = {**environment(device), "processes": num_together}
        self._relative_error = relative_error
        self._folder = folder

    def get(self, signature: Signature) -> Record | None:
        """The record of a signature, if there is one."""
        found = self._records.get(signature.key)
        if found is None and self._folder is not None and signature.is_portable:
            found = self._read(signature)
            if found is not None:
                self._records[signature.key] = found
        return found

    def put(self, signature: Signature, record: Record) -> None:
        """Keeps a record, on disk too where it may be."""
        self._records[signature.key] = record
        if self._folder is None or not signature.is_portable:
            return
        try:
            body = {"identity": self._identity(signature), "relative_error": self._relative_error, **_to_json(record)}
        except (NotImplementedError, TypeError, ValueError):
            return  # an output that JSON cannot say: measured anew in each process
        try:
            write_whole(self._path(signature), json.dumps({"digest": digest(body), "body": body}))
        except OSError as cause:
            _LOG.warning("profiles are not cached: %s cannot be written (%s)", self._folder, cause.strerror)
            self._folder = None

    def _is_settled(self, timing: Timing) -> bool:
        """Whether the repeats agreed: what was measured on a busy machine, or on a small budget, is measured again."""
        is_trivial = timing.forward_us + timing.backward_us < TRIVIAL_US
        return is_trivial or timing.spread <= SETTLED * self._relative_error

    def _identity(self, signature: Signature) -> dict[str, Any]:
        return {"schema": CACHE_SCHEMA, "signature": signature.key, **self._environment}

    def _path(self, signature: Signature) -> Path:
        assert self._folder is not None
        name = hashlib.sha256(json.dumps(self._identity(signature), sort_keys=True).encode()).hexdigest()[:40]
        return self._folder / "nodes" / name[:2] / f"{name}.json"

    def _read(self, signature: Signature) -> Record | None:
        path = self._path(signature)
        try:
            entry = json.loads(path.read_text())
            body = entry["body"]
            if entry["digest"] != digest(body) or body["identity"] != self._identity(signature):
                raise ValueError("another entry's content")
            record = _from_json(body)
            is_good = body["relative_error"] <= self._relative_error and self._is_settled(record.timing)
            return record if is_good else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
            _LOG.info("measuring again: the cached entry %s is not valid (%s)", path, cause)
            return None


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that readers see the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _to_json(record: Record) -> dict[str, Any]:
    trace = dataclasses.asdict(dataclasses.replace(record.trace, leaves=()))
    trace |= {
        "spec": pytree.treespec_dumps(record.trace.spec),
        "leaves": [_leaf_to_json(x) for x in record.trace.leaves],
    }
    return {"timing": dataclasses.asdict(record.timing), "trace": trace}


def _leaf_to_json(leaf: Any) -> Any:
    if isinstance(leaf, TensorOutput):
        return {**dataclasses.asdict(leaf), "dtype": str(leaf.dtype).removeprefix("torch.")}
    if leaf is None or type(leaf) in (bool, int, str):
        return leaf
    raise TypeError(f"a {type(leaf).__name__}")


def _from_json(body: dict[str, Any]) -> Record:
    timing = Timing(**body["timing"])
    for value in dataclasses.astuple(timing):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{value!r} for a cost")
    fields = dict(body["trace"])
    leaves = tuple(_leaf_from_json(x) for x in fields.pop("leaves"))
    spec = pytree.treespec_loads(fields.pop("spec"))
    if spec.num_leaves != len(leaves):
        raise ValueError("a structure that does not fit its leaves")
    return Record(timing=timing, trace=Trace(spec=spec, leaves=leaves, **{k: _tuple(v) for k, v in fields.items()}))


def _leaf_from_json(leaf: Any) -> Any:
    if not isinstance(leaf, dict):
        return leaf
    dtype = getattr(torch, leaf["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{leaf['dtype']!r} for a dtype")
    return TensorOutput(**{**leaf, "dtype": dtype, "shape": tuple(leaf["shape"]), "stride": tuple(leaf["stride"])})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
