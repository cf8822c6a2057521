"""Profiles any `torch.fx.GraphModule`, node by node: time and memory of each node, measured or estimated."""

from profiler.analytic import estimate
from profiler.api import profile
from profiler.errors import ProfileError
from profiler.links import measure_link
from profiler.records import DeviceSpec, LinkProfile, NodeProfile, ParameterProfile, Profile, SegmentProfile

__all__ = [
    "DeviceSpec",
    "LinkProfile",
    "NodeProfile",
    "ParameterProfile",
    "Profile",
    "ProfileError",
    "SegmentProfile",
    "estimate",
    "measure_link",
    "profile",
]
