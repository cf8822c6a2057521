"""Profiles: plain, frozen records of measured or estimated costs, and their JSON form
(`autopipe.profile/1`)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from profiler.errors import ProfileError

PROFILE_SCHEMA = "autopipe.profile/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProfile:
    """The costs of one node of a graph, for one micro-batch.

    Attributes:
        name: the name of the fx node, unique in its profile.
        inputs: names of the nodes whose outputs it reads (model inputs and parameters are not nodes of a profile).
        forward_us: time of its forward, in microseconds.
        backward_us: time of its backward, in microseconds; 0 where nothing is differentiated.
        output_bytes: size of its output.
        module: FQN of the submodule that it came from.
        saved_bytes: bytes of the storages that this node creates and that it, or a reader, keeps for backward: each
            storage once, parameters and buffers and model inputs excluded.
        params: names of the parameters and buffers that it reads.
        param_bytes: total size of these.
        workspace_bytes: the most memory that it holds while it runs, beyond inputs, outputs and saved tensors.
        differentiable: its output gets a gradient, which crosses a cut the other way.
        measured: false where the figures are estimated.
        group: nodes that name the same group are never cut apart (views that are written to, buffers that are updated).
        spread: relative half-width of the 95 % confidence interval of forward + backward; 0 where not known.
        keeps: nodes whose outputs its backward keeps, itself included where it keeps its own.
        views: other nodes, parameters and buffers into whose memory its output looks; it makes none of its own then.
        inner_bytes: the part of `saved_bytes` that is no output of a node (a dropout mask).
        repeatable: it may be computed again in the backward.
    """

    name: str
    inputs: tuple[str, ...]
    forward_us: float
    backward_us: float
    output_bytes: int
    module: str = ""
    saved_bytes: int = 0
    params: tuple[str, ...] = ()
    param_bytes: int = 0
    workspace_bytes: int = 0
    differentiable: bool = True
    measured: bool = True
    group: str | None = None
    spread: float = 0.0
    keeps: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    inner_bytes: int = 0
    repeatable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterProfile:
    """One parameter or buffer: its size in bytes, and whether it is trained (has a gradient and optimizer state)."""

    bytes: int
    trainable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentProfile:
    """A contiguous part of the graph that was run as a stage runs it, and the sums of its nodes when each is run by
    itself.

    The times of its nodes in the profile are their own times, multiplied by what was measured over these sums.

    Attributes:
        first, last: names of its first and last node.
        forward_us, backward_us: as measured.
        nodes_forward_us, nodes_backward_us: sums over its nodes.
    """

    first: str
    last: str
    forward_us: float
    backward_us: float
    nodes_forward_us: float
    nodes_backward_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """A link between two ranks: a message of b bytes takes `latency_us + b / bytes_per_us` microseconds.

    Attributes:
        latency_us: time of an empty message.
        bytes_per_us: bandwidth, in bytes a microsecond (1 Gbit/s is 125).
        overlap: the share of a transfer that compute hides, from 0 (none) to 1 (all).
        measured: false for a default that nobody measured.
        buffered: messages under way lie in memory of their own: the sender may drop a tensor at once, and the receiver
            makes it when it needs it. Where it is false both ends hold it meanwhile.
    """

    latency_us: float
    bytes_per_us: float
    overlap: float = 1.0
    measured: bool = True
    buffered: bool = False

    def transfer_us(self, num_bytes: float) -> float:
        """Time that a message of `num_bytes` takes, in microseconds."""
        return self.latency_us + num_bytes / self.bytes_per_us


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A device as published: its peak rates, for estimates where no device is at hand.

    Attributes:
        name: a short name, such as `h100`.
        memory_bytes: its memory.
        flops: peak dense floating-point operations a second, by dtype name (`float32`, `bfloat16`).
        bytes_per_s: memory bandwidth.
        source: where the figures were published.
    """

    name: str
    memory_bytes: int
    flops: Mapping[str, float]
    bytes_per_s: float
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The costs of a graph, node by node, in topological order.

    Attributes:
        nodes: one record for each compute node.
        device: where it was measured, for example `cpu` or `NVIDIA H100`.
        dtype: the dtype of the parameters, for example `float32`.
        torch: the torch version.
        microbatch_size: number of samples in the micro-batch that was run.
        parameters: size of each parameter and buffer by name; where it is empty the bytes of a node are split evenly
            over its names.
        link: the link between ranks, where it was measured.
        residual: factor that is still to be applied to every time; 1 where the times are those within the graph, as
            after calibration.
        segments: what the times of the nodes were calibrated with.
        graph_hash: identifies the graph that was profiled.
    """

    nodes: tuple[NodeProfile, ...]
    device: str = "unknown"
    dtype: str = "float32"
    torch: str = "unknown"
    microbatch_size: int = 1
    parameters: Mapping[str, ParameterProfile] = dataclasses.field(default_factory=dict)
    link: LinkProfile | None = None
    residual: float = 1.0
    segments: tuple[SegmentProfile, ...] = ()
    graph_hash: str = ""

    def __post_init__(self) -> None:
        _validate(self)

    def to_json(self) -> dict[str, Any]:
        """The profile as plain values, ready for `json.dumps`."""
        return {"schema": PROFILE_SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Reads a profile; only `name`, `inputs`, `forward_us`, `backward_us` and `output_bytes` of each node are
        required.

        Raises:
            ProfileError: an unknown schema, a missing or misspelt value, a negative number, a name that is not there, a
                cycle.
        """
        if not isinstance(data, dict):
            raise ProfileError(
                f"a profile of type {type(data).__name__}",
                expected="a JSON object",
                remedy="write one with `autopipe profile -o FILE`",
            )
        if data.get("schema") != PROFILE_SCHEMA:
            raise ProfileError(
                f"schema {data.get('schema')!r}",
                expected=repr(PROFILE_SCHEMA),
                where="schema",
                remedy="profile the model again with this version",
            )
        nodes = _list(data.get("nodes"), "nodes")
        known = {f.name for f in dataclasses.fields(cls)} - {"nodes", "parameters", "link", "segments"}
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ProfileError(
                f"parameters of type {type(parameters).__name__}",
                expected="a JSON object",
                where="parameters",
                remedy="write the profile with `autopipe profile -o FILE`",
            )
        link = data.get("link")
        return cls(
            nodes=tuple(
                _record(NodeProfile, n, f"nodes[{i}]", ("name", "inputs", "forward_us", "backward_us", "output_bytes"))
                for i, n in enumerate(nodes)
            ),
            parameters={k: _record(ParameterProfile, v, f"parameters[{k}]", ("bytes",)) for k, v in parameters.items()},
            segments=tuple(
                _record(SegmentProfile, s, f"segments[{i}]", [f.name for f in dataclasses.fields(SegmentProfile)])
                for i, s in enumerate(_list(data.get("segments", []), "segments"))
            ),
            link=None if link is None else _record(LinkProfile, link, "link", ("latency_us", "bytes_per_us")),
            **{k: data[k] for k in known & data.keys()},
        )

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a profile from a JSON file.

        Raises:
            ProfileError: the file is not there, is not JSON, or is not a valid profile.
        """
        return cls.from_json(read_json(path, ProfileError, "write one with `autopipe profile MODEL -o FILE`"))


def read_json(path: str | Path, error: type[ProfileError] | type[Any], remedy: str) -> Any:
    """The JSON value in a file; `error` where it cannot be read."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as cause:
        raise error(f"cannot read {str(path)!r}: {cause.strerror}", remedy=remedy) from None
    except (ValueError, RecursionError) as cause:
        raise error(f"{str(path)!r} is not JSON: {cause}", remedy=remedy) from None


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ProfileError(
            f"no list of {where}",
            expected="a list",
            where=where,
            remedy="write the profile with `autopipe profile -o FILE`",
        )
    return value


MAX_NUMBER = 2**63
"""No time, size or count in a file is as large."""
_KINDS: dict[str, type | tuple[type, ...]] = {"str": str, "bool": bool, "int": int, "float": (int, float)}


def _record(cls: type[Any], data: Any, where: str, required: Iterable[str]) -> Any:
    """One record from a JSON object, with the type of every field checked; fields that are not known are ignored."""
    if not isinstance(data, dict):
        raise ProfileError(
            f"a {type(data).__name__}",
            expected="a JSON object",
            where=where,
            remedy="compare the file with the format in docs/formats.md",
        )
    missing = [k for k in required if k not in data]
    if missing:
        raise ProfileError(
            f"no {missing[0]!r}", expected="a value", where=where, remedy=f"add {missing[0]!r} to the entry"
        )
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name not in data:
            continue
        value, kind = data[field.name], str(field.type)
        if kind.startswith("tuple"):
            ok = isinstance(value, list) and all(isinstance(v, str) for v in value)
            value = tuple(value) if ok else value
        elif kind == "str | None":
            ok = value is None or isinstance(value, str)
        else:
            if kind == "int" and isinstance(value, float) and value.is_integer():
                value = int(value)
            ok = isinstance(value, _KINDS[kind]) and not (kind in ("int", "float") and isinstance(value, bool))
            ok = ok and not (isinstance(value, int) and abs(value) >= MAX_NUMBER)
        if not ok:
            raise ProfileError(
                f"{value!r:.60}", expected=kind, where=f"{where}.{field.name}", remedy="correct the value in the file"
            )
        values[field.name] = value
    if cls is NodeProfile and "saved_bytes" not in data:
        values["saved_bytes"] = values["output_bytes"]
    return cls(**values)


def _validate(profile: Profile) -> None:
    def bad(got: str, expected: str, where: str) -> ProfileError:
        return ProfileError(
            got,
            expected=expected,
            where=where,
            remedy="correct the profile, or measure it again with `autopipe profile`",
        )

    kinds = {
        "device": "str",
        "dtype": "str",
        "torch": "str",
        "graph_hash": "str",
        "microbatch_size": "int",
        "residual": "float",
    }
    for name, kind in kinds.items():
        value = getattr(profile, name)
        if not isinstance(value, _KINDS[kind]) or (isinstance(value, int) and abs(value) >= MAX_NUMBER):
            raise bad(f"{value!r:.60}", kind, name)
    if not profile.nodes:
        raise bad("an empty list", "at least one node", "nodes")
    if profile.microbatch_size < 1:
        raise bad(f"{profile.microbatch_size}", "at least 1", "microbatch_size")
    if not (math.isfinite(profile.residual) and profile.residual > 0):
        raise bad(f"{profile.residual}", "a positive number", "residual")
    index: dict[str, int] = {}
    for i, node in enumerate(profile.nodes):
        if node.name in index:
            raise bad(f"the name {node.name!r} twice", "unique names", f"nodes[{i}].name")
        index[node.name] = i
        for field in (
            "forward_us",
            "backward_us",
            "output_bytes",
            "saved_bytes",
            "param_bytes",
            "workspace_bytes",
            "inner_bytes",
            "spread",
        ):
            value = getattr(node, field)
            if not (math.isfinite(value) and value >= 0):
                raise bad(f"{value}", "a number that is not negative", f"nodes[{i}].{field} ({node.name})")
    for i, node in enumerate(profile.nodes):
        for j, name in enumerate(node.inputs):
            if name not in index:
                raise bad(f"{name!r}", "the name of a node of this profile", f"nodes[{i}].inputs[{j}] ({node.name})")
            if index[name] >= i:
                raise bad(
                    f"{name!r}, which comes later or is the node itself",
                    "nodes in topological order, without a cycle",
                    f"nodes[{i}].inputs[{j}] ({node.name})",
                )
    for name, parameter in profile.parameters.items():
        if parameter.bytes < 0:
            raise bad(f"{parameter.bytes}", "a number that is not negative", f"parameters[{name}].bytes")
    for i, segment in enumerate(profile.segments):
        for name in (segment.first, segment.last):
            if name not in index:
                raise bad(f"{name!r}", "the name of a node of this profile", f"segments[{i}]")
        times = (segment.forward_us, segment.backward_us, segment.nodes_forward_us, segment.nodes_backward_us)
        if not all(math.isfinite(t) and t >= 0 for t in times):
            raise bad(f"{times}", "numbers that are not negative", f"segments[{i}]")
    link = profile.link
    if link is not None and not (link.latency_us >= 0 and link.bytes_per_us > 0 and 0 <= link.overlap <= 1):
        raise bad(f"{link}", "latency_us >= 0, bytes_per_us > 0, 0 <= overlap <= 1", "link")
