"""A profile of one device scaled to another: by the ratio of two estimates, node by node, and labelled as no
measurement."""

import dataclasses

import pytest

from profiler.errors import ProfileError
from profiler.records import NodeProfile, Profile
from profiler.scaling import known_device, scaled


def profile(device: str, *times: float) -> Profile:
    nodes = tuple(
        NodeProfile(name=f"n{i}", inputs=(), forward_us=t, backward_us=2 * t, output_bytes=8)
        for i, t in enumerate(times)
    )
    return Profile(nodes=nodes, device=device)


def test_each_node_by_the_ratio_of_its_rooflines() -> None:
    found = scaled(
        profile("x", 100.0, 100.0, 7.0, 10.0),
        profile("x", 50.0, 80.0, 0.0, 10.0),
        profile("h100", 10.0, 40.0, 0.0, 1.0),
    )
    assert [n.forward_us for n in found.nodes] == [20.0, 50.0, 7.0, 4.0]  # the last is the start of a kernel
    assert [n.backward_us for n in found.nodes] == [40.0, 100.0, 14.0, 4.0]
    assert found.device == "h100" and not any(n.measured for n in found.nodes)


def test_other_graphs_and_unknown_devices_are_refused() -> None:
    one, two = profile("x", 1.0), profile("x", 1.0, 2.0)
    with pytest.raises(ProfileError, match=r"1 nodes.*2.*remedy"):
        scaled(one, two, two)
    with pytest.raises(ProfileError, match="the same micro-batch size"):
        scaled(dataclasses.replace(one, microbatch_size=2), one, one)
    assert known_device("NVIDIA H100 80GB HBM3") == "h100"
    assert known_device("NVIDIA A100-SXM4-80GB") == "a100"
    for device in ("cpu", "unknown"):
        with pytest.raises(ProfileError, match="--from-device"):
            known_device(device)
