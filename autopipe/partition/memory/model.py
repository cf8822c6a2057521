"""How much memory a stage needs: parameters, gradients, optimizer state, activations in flight and workspace."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from autopipe.cost import CostGraph, FloatArray, IntArray, RecomputeOption, StageCosts, crossings, stage_costs, sum_by
from autopipe.schedule.program import MAX_POSTED_RECEIVES

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
    schedule: str = "1f1b"
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
        if self.schedule == "gpipe":
            return self.num_microbatches
        return min(num_stages - stage, self.num_microbatches)

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
class StageMemory:
    """(K) bytes of each stage, by part.

    `activation_bytes` are those of all micro-batches in flight, `workspace_bytes` also the messages under way. `recompute` is the class of `CostGraph.classes` that each stage takes, `recompute_us` what it adds to the backward.
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

    A stage takes the first class of recompute under which it fits; where none does, the one under which it needs least.
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
    received = received_bytes(graph, stage_of, K)
    sent = sent_bytes(graph, stage_of, K)
    ways = graph.classes
    at_once = np.array([[way.at_once] for way in ways], float)
    again = np.array([[not way.is_none] for way in ways], float)
    on = (stage_of[:, None] == np.arange(K)).astype(float)
    saved, largest = np.stack([w.saved_bytes for w in ways]) @ on, _largest(ways, stage_of, K)
    activations = in_flight * (saved + received + again * sent)
    workspace = largest + memory.buffer_bytes(received, sent) + at_once * (graph.saved_bytes @ on)
    peaks = static + activations + workspace
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
        recompute_us=(np.stack([w.recompute_us for w in ways]) @ on)[chosen, stages],
    )


def _largest(ways: tuple[RecomputeOption, ...], stage_of: IntArray, num_stages: int) -> FloatArray:
    """(classes, K) the largest workspace of each stage, 0 where it is empty."""
    order = np.argsort(stage_of, kind="stable")
    size = np.bincount(stage_of, minlength=num_stages)
    filled = np.flatnonzero(size)
    found = np.zeros((len(ways), num_stages))
    values = np.stack([way.workspace_bytes for way in ways])[:, order]
    found[:, filled] = np.maximum.reduceat(values, (np.cumsum(size) - size)[filled], axis=1)
    return found


def run_costs(graph: CostGraph, memory: MemoryModel, stage_of: IntArray, num_stages: int) -> StageCosts:
    """`stage_costs` with the time of recompute in the backward of each stage."""
    costs = stage_costs(graph, stage_of, num_stages)
    if not memory.constrains(graph):
        return costs
    again = stage_memory(graph, memory, stage_of, num_stages).recompute_us / graph.speed(num_stages)
    return dataclasses.replace(costs, backward_us=costs.backward_us + again)


def received_bytes(graph: CostGraph, stage_of: IntArray, num_stages: int) -> FloatArray:
    """(K) bytes that each stage receives in the forward of one micro-batch, each tensor once."""
    owner, target = crossings(graph, stage_of, num_stages)
    return sum_by(target, graph.tensor_bytes[owner], num_stages)


def sent_bytes(graph: CostGraph, stage_of: IntArray, num_stages: int) -> FloatArray:
    """(K) bytes of the tensors that each stage sends in the forward of one micro-batch, each once."""
    sent = np.unique(crossings(graph, stage_of, num_stages)[0])
    return sum_by(stage_of[graph.producer[sent]], graph.tensor_bytes[sent], num_stages)
