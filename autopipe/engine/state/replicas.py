"""Data parallelism: replicas sum their gradients, and under ZeRO-1 shard the optimizer state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopipe.engine.ranks.mesh import ProcessMesh

BUCKET_BYTES = 25 * 2**20
"""Gradients travel in buckets of about this size, as in `DistributedDataParallel`."""


class Replicas:
    """Communication between the ranks that hold the same stages. With one replica nothing is sent."""

    def __init__(self, mesh: ProcessMesh, zero_stage: int) -> None:
        self._mesh, self._zero_stage = mesh, zero_stage
        self._pending: list[tuple[Any, Tensor, list[Tensor]]] = []

    @property
    def single(self) -> bool:
        """Whether there is only one replica."""
        return self._mesh.data_parallel == 1

    # -- gradients ----------------------------------------------------------------------------------------------------

    def start_reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Start summing the gradients of these parameters, during the cool-down. Same calls in every replica."""
        if self.single:
            return
        for bucket in _buckets(parameters):
            flat = torch.cat([_gradient(p).reshape(-1) for p in bucket])
            work = dist.all_reduce(flat, group=self._mesh.data_group, async_op=True)
            self._pending.append((work, flat, [_gradient(p) for p in bucket]))

    def finish_reduce(self) -> None:
        """Wait for the sums and put them into `.grad`."""
        for work, flat, gradients in self._pending:
            work.wait()
            pieces = torch.split(flat, [g.numel() for g in gradients])
            for gradient, piece in zip(gradients, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))
        self._pending.clear()

    def used_anywhere(self, parameters: Sequence[nn.Parameter]) -> list[bool]:
        """For each parameter, whether any replica has a gradient for it; the others stay None, as in plain PyTorch."""
        here = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        if not self.single and len(here):
            dist.all_reduce(here, dist.ReduceOp.MAX, group=self._mesh.data_control)
        return [bool(x) for x in here]

    # -- parameters and buffers ---------------------------------------------------------------------------------------

    def share_buffers(self, buffers: Sequence[Tensor]) -> None:
        """Give every replica the buffers of the first, as `DistributedDataParallel` does (batch norm statistics)."""
        if not self.single:
            for buffer in buffers:
                dist.broadcast(buffer, self._mesh.rank_of(self._mesh.pipeline_rank, 0), group=self._mesh.data_group)

    def shard(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
        """The replica that owns each parameter: under ZeRO-1 the least loaded takes the next largest; -1: all own
        all."""
        if self._zero_stage == 0 or self.single:
            return dict.fromkeys(parameters, -1)
        load = [0] * self._mesh.data_parallel
        owner: dict[str, int] = {}
        for name in sorted(parameters, key=lambda n: (-parameters[n].numel(), n)):
            owner[name] = load.index(min(load))
            load[owner[name]] += parameters[name].numel()
        return owner

    def owns(self, owner: int) -> bool:
        """Return whether this rank's optimizer steps a parameter of this owner."""
        return owner in (-1, self._mesh.replica)

    def share_parameters(self, parameters: Mapping[str, nn.Parameter], owner: Mapping[str, int]) -> None:
        """After a ZeRO-1 step, take every parameter from the replica that stepped it."""
        if self.single or self._zero_stage == 0:
            return
        with torch.no_grad():
            for name, parameter in parameters.items():
                source = self._mesh.rank_of(self._mesh.pipeline_rank, owner[name])
                dist.broadcast(parameter.data, source, group=self._mesh.data_group)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Split parameters into buckets: in their order, with gradients of one dtype, up to the size of a bucket."""
    buckets: list[list[nn.Parameter]] = []
    size, last = 0, None
    for p in parameters:
        gradient = _gradient(p)
        if last != gradient.dtype or size + gradient.nbytes > BUCKET_BYTES:
            buckets.append([])
            size, last = 0, gradient.dtype
        buckets[-1].append(p)
        size += gradient.nbytes
    return buckets
