"""`CostGraph`: what is cut, as arrays of times, bytes and tensors, and what its stages may run on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from profiler.records import LinkProfile

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """Things (tensors, parameters) with the nodes that read them, flat: reader r belongs to thing `owner[r]`."""

    owner: IntArray
    node: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeOption:
    """One choice of what a stage computes again in the backward, and what each node then costs.

    Attributes:
        region: (nodes of the profile) the region that each node is in, -1 where it is not computed again.
        at_once: a stage is one region: all that it keeps is there again at once, for one micro-batch.
        saved_bytes, workspace_bytes: (n) as in `CostGraph`, with what is dropped left out and what is made again
            counted as workspace of the nodes of its region.
        recompute_us: (n) time that is added to the backward.
        is_none: nothing is computed again.
    """

    region: IntArray
    at_once: bool
    saved_bytes: FloatArray
    workspace_bytes: FloatArray
    recompute_us: FloatArray
    is_none: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_none", bool((self.region < 0).all()))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDevices:
    """Devices of K stages, if these or their links differ, or if replicas sum their gradients.

    Attributes:
        speed: (K) by which the compute of each stage is divided.
        latency_us, us_per_byte, exposed: (K, K) the link between two stages: a message of b bytes takes latency + b x
            us_per_byte, and compute does not hide the share `exposed` of it.
        reduce_latency_us, reduce_us_per_byte: (K) time of summing a stage's gradients over its replicas, after its last
            backward.
    """

    speed: FloatArray
    latency_us: FloatArray
    us_per_byte: FloatArray
    exposed: FloatArray
    reduce_latency_us: FloatArray
    reduce_us_per_byte: FloatArray

    def link(self, source: int, target: int) -> LinkProfile | None:
        """The link between two stages; None where both are on one rank."""
        per_byte = float(self.us_per_byte[source, target])
        if per_byte == 0.0:
            return None
        return LinkProfile(
            latency_us=float(self.latency_us[source, target]),
            bytes_per_us=1 / per_byte,
            overlap=1 - float(self.exposed[source, target]),
            measured=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CostGraph:
    """The graph that is cut. n nodes, T tensors that a node hands to others, P parameters and buffers.

    Attributes:
        members: (n) indices into `profile_names` of the profile's nodes that each node stands for.
        profile_names: names of the profile's nodes, in its order.
        forward_us, backward_us: (n) compute time of one micro-batch.
        saved_bytes, workspace_bytes: (n) bytes held from forward to backward, and most bytes held while it runs.
        predecessors, successors: (n) neighbours of each node.
        tensor_names: (T) the profile's nodes whose outputs these are; outputs read by the same nodes are one tensor.
        producer, tensor_bytes, gradient_bytes: (T) maker, bytes sent forward and bytes of the gradient that comes back.
        tensor_readers: who reads the tensors, the maker excluded.
        param_names, param_bytes, trainable: (P) parameters and buffers; one that several nodes share is one entry.
        param_readers: who reads the parameters.
        link: latency, bandwidth and overlap between stages.
        classes: what a stage may compute again: the first class under which it fits is taken.
        devices: what the stages run on; None: all alike, joined by `link`, and gradients are not summed over replicas.
    """

    members: tuple[tuple[int, ...], ...]
    profile_names: tuple[str, ...]
    forward_us: FloatArray
    backward_us: FloatArray
    saved_bytes: FloatArray
    workspace_bytes: FloatArray
    predecessors: tuple[tuple[int, ...], ...]
    successors: tuple[tuple[int, ...], ...]
    tensor_names: tuple[tuple[int, ...], ...]
    producer: IntArray
    tensor_bytes: FloatArray
    gradient_bytes: FloatArray
    tensor_readers: Readers
    param_names: tuple[str, ...]
    param_bytes: FloatArray
    trainable: NDArray[np.bool_]
    param_readers: Readers
    link: LinkProfile
    classes: tuple[RecomputeOption, ...]
    devices: StageDevices | None = None

    @property
    def num_nodes(self) -> int:
        """n, the number of nodes that a cut can tell apart."""
        return len(self.members)

    @property
    def work_us(self) -> FloatArray:
        """(n) forward plus backward time."""
        return self.forward_us + self.backward_us

    def speed(self, num_stages: int) -> FloatArray:
        """(K) by which the compute of each stage is divided."""
        return np.ones(num_stages) if self.devices is None else self.devices.speed

    @property
    def exposed(self) -> float:
        """The share 1 - o of a transfer that compute does not hide."""
        return 1.0 - self.link.overlap

    def closure(self, nodes: IntArray, neighbours: tuple[tuple[int, ...], ...]) -> NDArray[np.bool_]:
        """(n) the nodes and all that is reached from them over `predecessors` or `successors`."""
        reached, waiting = np.zeros(self.num_nodes, bool), nodes.tolist()
        while waiting:
            v = waiting.pop()
            if not reached[v]:
                reached[v] = True
                waiting += neighbours[v]
        return reached

    def node_of(self) -> IntArray:
        """(nodes of the profile) the node of this graph that stands for each."""
        node_of = np.empty(len(self.profile_names), np.int64)
        for i, members in enumerate(self.members):
            node_of[list(members)] = i
        return node_of


def sum_by(index: IntArray, weights: FloatArray, size: int) -> FloatArray:
    """(size) the sum of the weights that carry each index."""
    return np.asarray(np.bincount(index, weights=weights, minlength=size), np.float64)
