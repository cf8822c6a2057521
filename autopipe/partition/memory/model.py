"""Memory of a stage: parameters, gradients, optimizer state, activations in flight and workspace."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from autopipe.cost import CostGraph, FloatArray, IntArray, RecomputeOption, StageCosts, crossings, stage_costs, sum_by
from autopipe.schedule.event_graph import MAX_POSTED_RECEIVES
from autopipe.schedule.kinds import DEFAULT, KINDS

OPTIMIZER_STATES = {"none": 0.0, "sgd": 0.0, "momentum": 1.0, "adam": 2.0, "adamw": 2.0}
"""Bytes of optimizer state for each byte of trained parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """The rules by which bytes are charged to a stage.

    Attributes:
        num_microbatches: M, micro-batches of a step.
        schedule: `1f1b` holds min(K - k, M) micro-batches on stage k, `gpipe` all M.
        states: bytes of optimizer state for each byte of trained parameter.
        shards: ranks over which the optimizer state is divided (the replicas under ZeRO-1).
        limit_bytes: memory of each device; infinite where there is no limit.
        limits: memory of the device of each stage, where they differ.
    """

    num_microbatches: int
    schedule: str = DEFAULT
    states: float = 2.0
    shards: int = 1
    limit_bytes: float = np.inf
    limits: tuple[float, ...] = ()

    def limit(self, stage: int) -> float:
        """Memory of the device of a stage."""
        return self.limits[stage] if self.limits else self.limit_bytes

    def fits(self, peak_bytes: FloatArray) -> bool:
        """Whether (K) peaks are within the memory of each stage's device."""
        return bool((peak_bytes <= (np.array(self.limits) if self.limits else self.limit_bytes)).all())

    def in_flight(self, stage: int, num_stages: int) -> int:
        """Micro-batches whose activations a stage holds at most."""
        return KINDS[self.schedule].live(num_stages, self.num_microbatches, num_stages, stage)

    def peak_bytes(
        self, option: RecomputeOption, static: FloatArray, micro: MicrobatchBytes, in_flight: FloatArray | int
    ) -> FloatArray:
        """The most that a stage holds under an option of recompute, of any number of stages at once (arrays broadcast).

            peak = static + activations + workspace, in_flight = w micro-batches
            activations = w (saved + received + sent), where `sent` counts only if something is computed again:
                          otherwise what is sent is among what is saved
            workspace   = largest workspace + buffers + kept, where `kept` counts only if a stage is one region

        Args:
            static: bytes of parameters, gradients and optimizer state.
            micro: bytes of one micro-batch.
            in_flight: w, as `in_flight` gives it for each stage.
        """
        return static + self.activation_bytes(option, micro, in_flight) + self.workspace_bytes(option, micro)

    def activation_bytes(
        self, option: RecomputeOption, micro: MicrobatchBytes, in_flight: FloatArray | int
    ) -> FloatArray:
        """The activations of all micro-batches in flight."""
        sent = 0.0 if option.is_none else micro.sent
        return np.asarray(in_flight * (micro.saved + micro.received + sent), np.float64)

    def workspace_bytes(self, option: RecomputeOption, micro: MicrobatchBytes) -> FloatArray:
        """Bytes that a stage holds for a while: workspace, messages under way, and a region that is made
        again."""
        kept = micro.kept if option.at_once else 0.0
        return np.asarray(micro.workspace + self.buffer_bytes(micro.received, micro.sent) + kept, np.float64)

    def buffer_bytes(self, received: FloatArray, sent: FloatArray) -> FloatArray:
        """Bytes of messages under way, given those of one micro-batch.

        The engine posts receives ahead, of activations and of gradients, and as many gradients are still being sent.
        """
        ahead = min(MAX_POSTED_RECEIVES, self.num_microbatches - 1)
        return np.asarray(ahead * (2 * received + sent), np.float64)

    def constrains(self, graph: CostGraph) -> bool:
        """Whether a stage's memory decides anything: whether it is allowed, or what it computes again."""
        return bool(np.isfinite(min(self.limits, default=self.limit_bytes))) or not graph.classes[0].is_none

    def static_bytes(self, graph: CostGraph) -> FloatArray:
        """(P) parameter, gradient and optimizer bytes of each parameter."""
        return graph.param_bytes * (1.0 + graph.trainable * (1.0 + self.states / self.shards))


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchBytes:
    """Bytes of one micro-batch on a stage, or on many; arrays of one shape.

    Attributes:
        saved: kept from forward to backward under the option of recompute.
        received, sent: activations that come from other stages and go to them, each tensor once.
        workspace: the largest of any node.
        kept: what would be saved if nothing were computed again.
    """

    saved: FloatArray
    received: FloatArray
    sent: FloatArray
    workspace: FloatArray
    kept: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """(K) bytes of each stage, by part.

    Attributes:
        activation_bytes: of all micro-batches in flight.
        workspace_bytes: with the messages under way.
        recompute: the option of `CostGraph.classes` that each stage takes.
        recompute_us: what it adds to the backward, on a device of speed 1.
    """

    param_bytes: FloatArray
    gradient_bytes: FloatArray
    optimizer_bytes: FloatArray
    activation_bytes: FloatArray
    workspace_bytes: FloatArray
    recompute: IntArray
    recompute_us: FloatArray

    @property
    def peak_bytes(self) -> FloatArray:
        """(K) the most that each stage holds."""
        parts = self.param_bytes + self.gradient_bytes + self.optimizer_bytes
        return parts + self.activation_bytes + self.workspace_bytes


def stage_memory(graph: CostGraph, memory: MemoryModel, stage_of: IntArray, num_stages: int) -> StageMemory:
    """Memory of each stage under an assignment `stage_of` (n) of nodes to stages.

    A stage takes the first option of recompute under which it fits; if none does, the one under which it needs least.
    """
    K, readers = num_stages, graph.param_readers
    held = np.unique(readers.owner * K + stage_of[readers.node])
    owner, stage = held // K, held % K
    trained = graph.param_bytes * graph.trainable
    in_flight = np.array([memory.in_flight(k, K) for k in range(K)], float)
    param_bytes = sum_by(stage, graph.param_bytes[owner], K)
    gradient_bytes = sum_by(stage, trained[owner], K)
    optimizer_bytes = sum_by(stage, trained[owner] * memory.states / memory.shards, K)
    static = param_bytes + gradient_bytes + optimizer_bytes
    options = graph.classes
    on = (stage_of[:, None] == np.arange(K)).astype(float)
    received, sent, kept = received_bytes(graph, stage_of, K), sent_bytes(graph, stage_of, K), graph.saved_bytes @ on
    micro = [
        MicrobatchBytes(saved=option.saved_bytes @ on, received=received, sent=sent, workspace=largest, kept=kept)
        for option, largest in zip(options, _largest(options, stage_of, K), strict=True)
    ]
    pairs = list(zip(options, micro, strict=True))
    peaks = np.stack([memory.peak_bytes(option, static, m, in_flight) for option, m in pairs])
    activations = np.stack([memory.activation_bytes(option, m, in_flight) for option, m in pairs])
    workspace = np.stack([memory.workspace_bytes(option, m) for option, m in pairs])
    fits = peaks <= np.array([memory.limit(k) for k in range(K)])
    chosen = np.where(fits.any(axis=0), fits.argmax(axis=0), peaks.argmin(axis=0))
    stages = np.arange(K)
    return StageMemory(
        param_bytes=param_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=optimizer_bytes,
        activation_bytes=activations[chosen, stages],
        workspace_bytes=workspace[chosen, stages],
        recompute=chosen,
        recompute_us=(np.stack([option.recompute_us for option in options]) @ on)[chosen, stages],
    )


def _largest(options: tuple[RecomputeOption, ...], stage_of: IntArray, num_stages: int) -> FloatArray:
    """(options, K) the largest workspace of each stage, 0 where it is empty."""
    order = np.argsort(stage_of, kind="stable")
    size = np.bincount(stage_of, minlength=num_stages)
    filled = np.flatnonzero(size)
    found = np.zeros((len(options), num_stages))
    values = np.stack([option.workspace_bytes for option in options])[:, order]
    found[:, filled] = np.maximum.reduceat(values, (np.cumsum(size) - size)[filled], axis=1)
    return found


def run_costs(graph: CostGraph, memory: MemoryModel, stage_of: IntArray, num_stages: int) -> StageCosts:
    """`stage_costs` with the time of recompute in the backward of each stage."""
    costs = stage_costs(graph, stage_of, num_stages)
    if not memory.constrains(graph):
        return costs
    return with_recompute(costs, stage_memory(graph, memory, stage_of, num_stages), graph)


def with_recompute(costs: StageCosts, held: StageMemory, graph: CostGraph) -> StageCosts:
    """Costs whose backwards also take the time of recompute, each on the device of its stage."""
    again_us = held.recompute_us / graph.speed(len(held.recompute_us))
    return dataclasses.replace(costs, backward_us=costs.backward_us + again_us)


def received_bytes(graph: CostGraph, stage_of: IntArray, num_stages: int) -> FloatArray:
    """(K) bytes that each stage receives in the forward of one micro-batch, each tensor once."""
    owner, target = crossings(graph, stage_of, num_stages)
    return sum_by(target, graph.tensor_bytes[owner], num_stages)


def sent_bytes(graph: CostGraph, stage_of: IntArray, num_stages: int) -> FloatArray:
    """(K) bytes of the tensors that each stage sends in the forward of one micro-batch, each once."""
    sent = np.unique(crossings(graph, stage_of, num_stages)[0])
    return sum_by(stage_of[graph.producer[sent]], graph.tensor_bytes[sent], num_stages)
