"""A `CostGraph` and an assignment of its nodes to stages → what each stage costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopipe.cost.graph import CostGraph, FloatArray, IntArray, StageDevices, sum_by
from profiler.records import LinkProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """Costs of each of K stages for one micro-batch, as (K) arrays, and each pair of stages, as (K, K) arrays.

    Attributes:
        forward_us, backward_us: compute time.
        forward_exposed_us, backward_exposed_us: the share of transfers that is not hidden, at both ends.
        edge_bytes, edge_gradient_bytes: bytes from a stage to another, and of the gradients that come back.
        edge: whether anything goes from a stage to another.
        link: what a transfer costs.
        devices: what the stages run on, in the place of `link`, where they are not alike.
        reduce_us: time of summing a stage's gradients over the replicas.
    """

    forward_us: FloatArray
    backward_us: FloatArray
    forward_exposed_us: FloatArray
    backward_exposed_us: FloatArray
    edge_bytes: FloatArray
    edge_gradient_bytes: FloatArray
    edge: NDArray[np.bool_]
    link: LinkProfile
    devices: StageDevices | None = None
    reduce_us: FloatArray | None = None

    @property
    def load_us(self) -> FloatArray:
        """(K) time that a stage is busy with one micro-batch: compute and the share of transfers that is not hidden."""
        return self.forward_us + self.backward_us + self.forward_exposed_us + self.backward_exposed_us

    def busy_us(self) -> tuple[FloatArray, FloatArray]:
        """(K), (K) forward and backward time of a stage with the exposed share of every message that it sends or
        receives.

        Unlike in `load_us`, each pair of stages has a message of its own, and a tensor that two stages read is sent
        twice: that is what the engine does, and what is simulated. It is never less than `load_us`.
        """
        there, back, exposed = self._messages_us()
        there, back = there * exposed, back * exposed
        forward = self.forward_us + there.sum(axis=0) + there.sum(axis=1)
        return forward, self.backward_us + back.sum(axis=0) + back.sum(axis=1)

    def links(self) -> dict[tuple[int, int], tuple[float, float | None]]:
        """For each pair of stages with traffic, how long its message holds the link beside compute, forward and back.

        The second is None where no gradient comes back.
        """
        there, back, exposed = self._messages_us()
        there, back = there * (1 - exposed), back * (1 - exposed)
        found: dict[tuple[int, int], tuple[float, float | None]] = {}
        for source, target in np.argwhere(self.edge).tolist():
            has_gradient = bool(self.edge_gradient_bytes[source, target])
            found[source, target] = (
                float(there[source, target]),
                float(back[source, target]) if has_gradient else None,
            )
        return found

    def _messages_us(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(K, K) time of the message from a stage to another, of the gradient that comes back, and the share not
        hidden."""
        devices, everywhere = self.devices, np.ones_like(self.edge_bytes)
        latency = everywhere * self.link.latency_us if devices is None else devices.latency_us
        per_byte = everywhere / self.link.bytes_per_us if devices is None else devices.us_per_byte
        exposed = everywhere * (1 - self.link.overlap) if devices is None else devices.exposed
        there = np.where(self.edge, latency + self.edge_bytes * per_byte, 0.0)
        back = np.where(self.edge_gradient_bytes > 0, latency + self.edge_gradient_bytes * per_byte, 0.0)
        return there, back, exposed


def stage_costs(graph: CostGraph, stage_of: IntArray, num_stages: int) -> StageCosts:
    """Costs of the stages under an assignment `stage_of` (n) of nodes to stages.

    A tensor costs its maker's stage b/B once and every stage that reads it b/B once, its gradient the same way back
    (the load of Tarnawski et al., NeurIPS 2020); the latency comes once for each side of a stage that anything crosses,
    each way.
    """
    K, link = num_stages, graph.link
    crossing, target = crossings(graph, stage_of, K)
    source = stage_of[graph.producer[crossing]]
    sent = np.unique(crossing)

    def exposed(num_bytes: FloatArray, edge: NDArray[np.bool_]) -> FloatArray:
        out = sum_by(stage_of[graph.producer[sent]], num_bytes[sent], K)
        into = sum_by(target, num_bytes[crossing], K)
        messages = edge.any(axis=0).astype(float) + edge.any(axis=1)
        return np.asarray(graph.exposed * ((out + into) / link.bytes_per_us + link.latency_us * messages), float)

    def between(weights: FloatArray) -> FloatArray:
        return sum_by(source * K + target, weights, K * K).reshape(K, K)

    edge = between(np.ones(len(crossing))) > 0
    gradients = between(graph.gradient_bytes[crossing])
    devices = graph.devices
    speed = graph.speed(K)
    return StageCosts(
        forward_us=sum_by(stage_of, graph.forward_us, K) / speed,
        backward_us=sum_by(stage_of, graph.backward_us, K) / speed,
        forward_exposed_us=exposed(graph.tensor_bytes, edge),
        backward_exposed_us=exposed(graph.gradient_bytes, gradients > 0),
        edge_bytes=between(graph.tensor_bytes[crossing]),
        edge_gradient_bytes=gradients,
        edge=edge,
        link=link,
        devices=devices,
        reduce_us=None if devices is None else _reduce_us(graph, devices, stage_of),
    )


def _reduce_us(graph: CostGraph, devices: StageDevices, stage_of: IntArray) -> FloatArray:
    """(K) time of summing the gradients of each stage over its replicas; 0 where it trains nothing."""
    K, readers = len(devices.speed), graph.param_readers
    held = np.unique(readers.owner * K + stage_of[readers.node])
    num_bytes = sum_by(held % K, (graph.param_bytes * graph.trainable)[held // K], K)
    return np.where(num_bytes > 0, devices.reduce_latency_us + devices.reduce_us_per_byte * num_bytes, 0.0)


def crossings(graph: CostGraph, stage_of: IntArray, num_stages: int) -> tuple[IntArray, IntArray]:
    """Tensors that cross and the stages that read them, one entry for each (tensor, stage)."""
    owner = graph.tensor_readers.owner
    target = stage_of[graph.tensor_readers.node]
    crossing = target != stage_of[graph.producer[owner]]
    keys = np.unique(owner[crossing] * num_stages + target[crossing])
    return keys // num_stages, keys % num_stages
