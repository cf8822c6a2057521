"""Devices and how they are connected: nodes, devices, links; its JSON form is `autopipe.cluster/1`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from autopipe.errors import ClusterError
from autopipe.units import BYTES_PER_US_OF_A_GBPS
from profiler.devices import DEVICES
from profiler.records import LinkProfile, read_json

CLUSTER_SCHEMA = "autopipe.cluster/1"
NODE_FIELDS = ("count", "devices", "speed", "device", "memory_bytes")
DEVICE_FIELDS = ("speed", "device", "memory_bytes")
LINK_FIELDS = ("latency_us", "gbps", "overlap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device.

    Attributes:
        speed: how much faster it is than the device of the profile, or than the others of its kind.
        kind: a device that `profiler.estimate` knows, such as `h100`: a profile of another device is scaled to it.
            Empty: the device of the profile.
        memory_bytes: its memory; 0: no limit.
    """

    speed: float = 1.0
    kind: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Devices in the order of the ranks that run on them.

    Attributes:
        nodes: the devices of each node.
        within: the link between two devices of a node.
        between: the link between devices of two nodes: what one device gets while all of its node are sending.
    """

    nodes: tuple[tuple[Device, ...], ...]
    within: LinkProfile
    between: LinkProfile

    @classmethod
    def even(
        cls,
        num_devices: int,
        link: LinkProfile,
        *,
        devices_per_node: int | None = None,
        between: LinkProfile | None = None,
        device: Device | None = None,
    ) -> Self:
        """Equal devices; all on one node unless a number for each node is given, which must divide theirs.

        Raises:
            ClusterError: no device, or nodes that would not be equal.
        """
        per_node = num_devices if devices_per_node is None else devices_per_node
        if num_devices < 1 or per_node < 1 or num_devices % per_node:
            raise _bad(
                f"{num_devices} devices, {per_node} on each node",
                "at least 1, and equal nodes",
                "the number of devices",
            )
        node = (device or Device(),) * per_node
        return cls(nodes=(node,) * (num_devices // per_node), within=link, between=between or link)

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices, node by node: device r runs rank r."""
        return tuple(itertools.chain.from_iterable(self.nodes))

    @property
    def node_of(self) -> tuple[int, ...]:
        """The node of each device."""
        return tuple(itertools.chain.from_iterable((i,) * len(node) for i, node in enumerate(self.nodes)))

    @property
    def is_even(self) -> bool:
        """Whether all devices are alike."""
        return len(set(self.devices)) == 1

    def first(self, num_devices: int) -> Cluster:
        """The first so many devices.

        Raises:
            ClusterError: there are fewer.
        """
        if num_devices > len(self.devices):
            raise ClusterError(
                f"{num_devices} devices of {len(self.devices)}",
                expected="at most as many as the cluster has",
                where="num_devices",
                remedy="ask for fewer, or add nodes to the cluster file",
            )
        left, nodes = num_devices, []
        for node in self.nodes:
            nodes.append(node[:left])
            left -= len(nodes[-1])
        return dataclasses.replace(self, nodes=tuple(node for node in nodes if node))

    def slowest_link(self, pairs: Sequence[tuple[int, int]]) -> LinkProfile:
        """The link on which a message takes longest of those between these pairs of devices."""
        node_of = self.node_of
        apart = any(node_of[a] != node_of[b] for a, b in pairs)
        return self.between if apart else self.within

    def to_json(self) -> dict[str, Any]:
        """The cluster as plain values, ready for `json.dumps`; equal neighbouring nodes are one entry."""
        entries: list[dict[str, Any]] = []
        for node, same in itertools.groupby(self.nodes):
            alike = len(set(node)) == 1
            devices = (
                {"devices": len(node), **_device_json(node[0])} if alike else {"devices": [*map(_device_json, node)]}
            )
            entries.append({"count": len(list(same)), **devices})
        links = {"within_node": _link_json(self.within), "between_nodes": _link_json(self.between)}
        return {"schema": CLUSTER_SCHEMA, "nodes": entries, **links}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Reads a cluster.

        Raises:
            ClusterError: an unknown schema or field, no device, a number out of its range, an unknown kind of device.
        """
        values = _object(data, "the cluster", ("schema", "nodes", "within_node", "between_nodes"))
        if values.get("schema") != CLUSTER_SCHEMA:
            raise _bad(f"schema {values.get('schema')!r}", repr(CLUSTER_SCHEMA), "schema")
        entries = values.get("nodes")
        if not isinstance(entries, list) or not entries:
            raise _bad(f"{entries!r}", "a list of at least one node", "nodes")
        nodes = [node for i, entry in enumerate(entries) for node in _nodes(entry, f"nodes[{i}]")]
        if "within_node" not in values:
            raise _bad("no 'within_node'", "a link: latency_us and gbps", "within_node")
        within = _link(values["within_node"], "within_node")
        if len(nodes) > 1 and "between_nodes" not in values:
            raise _bad(f"{len(nodes)} nodes without 'between_nodes'", "a link: latency_us and gbps", "between_nodes")
        between = _link(values["between_nodes"], "between_nodes") if "between_nodes" in values else within
        return cls(nodes=tuple(nodes), within=within, between=between)

    def save(self, path: str | Path) -> None:
        """Writes the cluster as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a cluster from a JSON file.

        Raises:
            ClusterError: the file is not there, is not JSON, or is not a valid cluster.
        """
        return cls.from_json(read_json(path, ClusterError, "write one as docs/formats.md says, or name another file"))


def _bad(got: str, expected: str, where: str) -> ClusterError:
    return ClusterError(
        got, expected=expected, where=where, remedy="correct the cluster; docs/formats.md has an example"
    )


def _object(data: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    """A JSON object without fields that nobody reads: a misspelt one would be a default in silence."""
    if not isinstance(data, dict):
        raise _bad(f"a {type(data).__name__}", "a JSON object", where)
    strange = [name for name in data if name not in known]
    if strange:
        raise _bad(f"the field {strange[0]!r}", f"one of {', '.join(known)}", where)
    return data


def _number(values: dict[str, Any], name: str, where: str, default: float | None, *, positive: bool = True) -> float:
    value = values.get(name, default)
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise _bad(f"{value!r}", "a number above 0" if positive else "a number that is not negative", f"{where}.{name}")
    return number


def _whole(values: dict[str, Any], name: str, where: str, default: int, *, least: int) -> int:
    value = values.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _bad(f"{value!r}", f"a whole number of at least {least}", f"{where}.{name}")
    return value


def _nodes(data: Any, where: str) -> list[tuple[Device, ...]]:
    values = _object(data, where, NODE_FIELDS)
    given = values.get("devices")
    if isinstance(given, list):
        if not given:
            raise _bad("an empty list", "at least one device", f"{where}.devices")
        twice = [name for name in DEVICE_FIELDS if name in values]
        if twice:
            raise _bad(f"{twice[0]!r} beside a list of devices", "it in each device of the list", where)
        devices = tuple(_device(entry, f"{where}.devices[{i}]", DEVICE_FIELDS) for i, entry in enumerate(given))
    else:
        devices = (_device(values, where, NODE_FIELDS),) * _whole(values, "devices", where, 0, least=1)
    return [devices] * _whole(values, "count", where, 1, least=1)


def _device(data: Any, where: str, known: Sequence[str]) -> Device:
    values = _object(data, where, known)
    kind = values.get("device", "")
    if kind != "" and kind not in DEVICES:
        raise _bad(f"{kind!r}", f"one of {', '.join(DEVICES)}", f"{where}.device")
    memory = DEVICES[kind].memory_bytes if kind else 0
    return Device(
        speed=_number(values, "speed", where, 1.0),
        kind=kind,
        memory_bytes=_whole(values, "memory_bytes", where, memory, least=0),
    )


def _link(data: Any, where: str) -> LinkProfile:
    values = _object(data, where, LINK_FIELDS)
    overlap = _number(values, "overlap", where, 1.0, positive=False)
    if overlap > 1:
        raise _bad(f"{overlap}", "a share from 0 (nothing hidden) to 1 (all hidden)", f"{where}.overlap")
    return LinkProfile(
        latency_us=_number(values, "latency_us", where, None, positive=False),
        bytes_per_us=_number(values, "gbps", where, None) * BYTES_PER_US_OF_A_GBPS,
        overlap=overlap,
        measured=False,
    )


def _device_json(device: Device) -> dict[str, Any]:
    kind = {"device": device.kind} if device.kind else {}
    return {"speed": device.speed, **kind, "memory_bytes": device.memory_bytes}


def _link_json(link: LinkProfile) -> dict[str, float]:
    gbps = link.bytes_per_us / BYTES_PER_US_OF_A_GBPS
    return {"latency_us": link.latency_us, "gbps": gbps, "overlap": link.overlap}
