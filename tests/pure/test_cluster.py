"""The description of devices: what is written is read again, and every wrong value is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from autopipe.cluster import CLUSTER_SCHEMA, Cluster, Device
from autopipe.errors import ClusterError
from profiler.devices import DEVICES
from profiler.records import LinkProfile

FAST = {"latency_us": 3.0, "gbps": 3600}
SLOW = {"latency_us": 12.0, "gbps": 400, "overlap": 0.5}


def data(**values: Any) -> dict[str, Any]:
    nodes = [{"count": 2, "devices": 4, "speed": 2.0, "memory_bytes": 100}, {"devices": [{"device": "h100"}, {}]}]
    return {"schema": CLUSTER_SCHEMA, "nodes": nodes, "within_node": FAST, "between_nodes": SLOW} | values


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    cluster = Cluster.from_json(data())
    cluster.save(tmp_path / "c.json")
    assert Cluster.load(tmp_path / "c.json") == cluster
    assert len(cluster.devices) == 10
    assert cluster.node_of == (0, 0, 0, 0, 1, 1, 1, 1, 2, 2)
    assert cluster.devices[8] == Device(kind="h100", memory_bytes=DEVICES["h100"].memory_bytes)
    assert not cluster.is_even
    assert cluster.between == LinkProfile(latency_us=12.0, bytes_per_us=50_000.0, overlap=0.5, measured=False)


def test_links_are_those_within_and_between_nodes() -> None:
    cluster = Cluster.from_json(data())
    assert cluster.slowest_link([(0, 1), (4, 7)]) == cluster.within
    assert cluster.slowest_link([(0, 1), (3, 4)]) == cluster.between
    assert [len(node) for node in cluster.first(6).nodes] == [4, 2]
    with pytest.raises(ClusterError, match=r"11 devices of 10.*remedy"):
        cluster.first(11)


def test_a_cluster_of_equal_nodes() -> None:
    link = LinkProfile(latency_us=1.0, bytes_per_us=10.0)
    cluster = Cluster.even(8, link, devices_per_node=4, device=Device(memory_bytes=7))
    assert cluster.is_even and len(cluster.nodes) == 2 and cluster.between == link
    assert Cluster.even(3, link).node_of == (0, 0, 0)
    with pytest.raises(ClusterError, match="8 devices, 3 on each node"):
        Cluster.even(8, link, devices_per_node=3)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"schema": "autopipe.cluster/2"}, "schema"),
        ({"nodes": []}, "nodes"),
        ({"nodes": {}}, "nodes"),
        ({"nodes": [3]}, r"nodes\[0\]"),
        ({"nodes": [{}]}, r"nodes\[0\]\.devices"),
        ({"nodes": [{"devices": 0}]}, r"nodes\[0\]\.devices"),
        ({"nodes": [{"devices": []}]}, r"nodes\[0\]\.devices"),
        ({"nodes": [{"devices": 1.5}]}, r"nodes\[0\]\.devices"),
        ({"nodes": [{"devices": 1, "count": 0}]}, r"nodes\[0\]\.count"),
        ({"nodes": [{"devices": 1, "speed": 0}]}, r"nodes\[0\]\.speed"),
        ({"nodes": [{"devices": 1, "speed": float("nan")}]}, r"nodes\[0\]\.speed"),
        ({"nodes": [{"devices": 1, "memory_bytes": -1}]}, r"nodes\[0\]\.memory_bytes"),
        ({"nodes": [{"devices": 1, "device": "b300"}]}, r"'b300'.*h100.*nodes\[0\]\.device"),
        ({"nodes": [{"devices": 1, "memory": 3}]}, r"the field 'memory'.*memory_bytes.*nodes\[0\]"),
        ({"nodes": [{"devices": [{}], "speed": 2}]}, "'speed' beside a list"),
        ({"nodes": [{"devices": [{"speed": "fast"}]}]}, r"nodes\[0\]\.devices\[0\]\.speed"),
        ({"within_node": {"latency_us": 1}}, r"within_node\.gbps"),
        ({"within_node": {"latency_us": -1, "gbps": 1}}, r"within_node\.latency_us"),
        ({"within_node": {"latency_us": 1, "gbps": -1}}, r"within_node\.gbps"),
        ({"between_nodes": {"latency_us": 1, "gbps": 1, "overlap": 2}}, r"between_nodes\.overlap"),
        ({"between": FAST}, "the field 'between'"),
    ],
)
def test_what_is_no_cluster_is_refused(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ClusterError, match=rf"{where}.*remedy"):
        Cluster.from_json(data(**changes))


def test_missing_parts_and_files_are_named(tmp_path: Path) -> None:
    for name in ("within_node", "between_nodes", "nodes"):
        values = data()
        del values[name]
        with pytest.raises(ClusterError, match=name):
            Cluster.from_json(values)
    with pytest.raises(ClusterError, match="JSON object"):
        Cluster.from_json([])
    path = tmp_path / "c.json"
    with pytest.raises(ClusterError, match="cannot read"):
        Cluster.load(path)
    path.write_text(json.dumps(data())[:-1])
    with pytest.raises(ClusterError, match="is not JSON"):
        Cluster.load(path)
