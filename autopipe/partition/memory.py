"""How much memory a stage needs: parameters, gradients, optimizer state, activations in flight and workspace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopipe.cost import CostGraph, FloatArray, IntArray, sum_by

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
    """

    num_microbatches: int
    schedule: str = "1f1b"
    states: float = 2.0
    shards: int = 1
    limit_bytes: float = np.inf

    def in_flight(self, stage: int, num_stages: int) -> int:
        """Micro-batches whose activations a stage holds at most."""
        if self.schedule == "gpipe":
            return self.num_microbatches
        return min(num_stages - stage, self.num_microbatches)

    def static_bytes(self, graph: CostGraph) -> FloatArray:
        """(P) parameter, gradient and optimizer bytes of each parameter."""
        return graph.param_bytes * (1.0 + graph.trainable * (1.0 + self.states / self.shards))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """(K) bytes of each stage, by part; `activation_bytes` are those of all micro-batches in flight."""

    param_bytes: FloatArray
    gradient_bytes: FloatArray
    optimizer_bytes: FloatArray
    activation_bytes: FloatArray
    workspace_bytes: FloatArray

    @property
    def peak_bytes(self) -> FloatArray:
        """(K) the most that each stage holds."""
        parts = self.param_bytes + self.gradient_bytes + self.optimizer_bytes
        return parts + self.activation_bytes + self.workspace_bytes


def stage_memory(graph: CostGraph, memory: MemoryModel, stage_of: IntArray, num_stages: int) -> StageMemory:
    """Memory of each stage under an assignment `stage_of` (n) of nodes to stages."""
    K, readers = num_stages, graph.param_readers
    held = np.unique(readers.owner * K + stage_of[readers.node])
    owner, stage = held // K, held % K
    trained = graph.param_bytes * graph.trainable
    workspace = np.zeros(K)
    np.maximum.at(workspace, stage_of, graph.workspace_bytes)
    received = received_bytes(graph, stage_of, K)
    in_flight = np.array([memory.in_flight(k, K) for k in range(K)], float)
    return StageMemory(
        param_bytes=sum_by(stage, graph.param_bytes[owner], K),
        gradient_bytes=sum_by(stage, trained[owner], K),
        optimizer_bytes=sum_by(stage, trained[owner] * memory.states / memory.shards, K),
        activation_bytes=in_flight * (sum_by(stage_of, graph.saved_bytes, K) + received),
        workspace_bytes=workspace,
    )


def received_bytes(graph: CostGraph, stage_of: IntArray, num_stages: int) -> FloatArray:
    """(K) bytes that each stage receives in the forward of one micro-batch, each tensor once."""
    owner, target = graph.tensor_readers.owner, stage_of[graph.tensor_readers.node]
    crossing = target != stage_of[graph.producer[owner]]
    keys = np.unique(owner[crossing] * num_stages + target[crossing])
    return sum_by(keys % num_stages, graph.tensor_bytes[keys // num_stages], num_stages)
