"""A measured profile and two estimates of the same graph become the profile on the second estimate's device.

Each node's measured time is multiplied by the ratio of its rooflines: what the operators of its class take on the other
device over what they take on the device that was measured, each from published rates and the shares of them that the
class reaches.
"""

from __future__ import annotations

import dataclasses

from profiler.devices import DEVICES, efficiency_of
from profiler.errors import ProfileError
from profiler.records import NodeProfile, Profile


def known_device(device: str) -> str:
    """The published device that a profile's device is, by its product name.

    Raises:
        ProfileError: it is none of them, or a CPU, of which there are too many for one to stand for all.
    """
    words = device.lower().replace("-", " ").split()
    for name in DEVICES:
        if name in words and name != "cpu":
            return name
    raise ProfileError(
        f"a profile of the device {device!r}",
        expected=f"a device with published rates: {', '.join(DEVICES)}",
        where="the profile to scale",
        remedy="name the device that it is closest to with --from-device; cpu is a whole socket of 64 cores",
    )


def scaled(measured: Profile, source: Profile, target: Profile) -> Profile:
    """The profile on the device of `target`, every row marked as not measured.

    Args:
        measured: of one device, at the size of the estimates.
        source, target: estimates of the same graph for that device and for the other one.

    Raises:
        ProfileError: the profiles are not of the same nodes and micro-batch size.
    """
    for other in (source, target):
        mine = [n.name for n in measured.nodes]
        if mine != [n.name for n in other.nodes] or measured.microbatch_size != other.microbatch_size:
            raise ProfileError(
                f"a profile of {len(mine)} nodes at micro-batch size {measured.microbatch_size} for a graph of "
                f"{len(other.nodes)} nodes at {other.microbatch_size}",
                expected="the same model at the same micro-batch size",
                where="the profile to scale",
                remedy="give the model that was profiled, with the same --num-microbatches",
            )
    least_us = efficiency_of(DEVICES[target.device]).launch_us if target.device in DEVICES else 0.0
    rows = zip(measured.nodes, source.nodes, target.nodes, strict=True)
    nodes = tuple(_scaled(m, a, b, least_us) for m, a, b in rows)
    return dataclasses.replace(measured, nodes=nodes, device=target.device)


def _scaled(measured: NodeProfile, source: NodeProfile, target: NodeProfile, least_us: float) -> NodeProfile:
    def time_us(here: float, one: float, other: float) -> float:
        # A node without an operator that takes time has no ratio: it takes what was measured.
        return max(here * other / one, least_us if here else 0.0) if one > 0 else here

    return dataclasses.replace(
        measured,
        forward_us=time_us(measured.forward_us, source.forward_us, target.forward_us),
        backward_us=time_us(measured.backward_us, source.backward_us, target.backward_us),
        measured=False,
        spread=0.0,
    )
