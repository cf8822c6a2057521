"""Two checks of every step: that all ranks make the same call, and the sum of the loss.

On a CPU both overlap with the computes. The comparison is waited for before the first transfer. A rank begins to sum
the loss once its actions are over, or at its first backward if it has no loss to add. If shared memory joins the ranks
of the only replica, each compares with its neighbours alone; otherwise all compare together.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopipe.engine.ranks.context import Context
from autopipe.engine.ranks.mesh import ProcessMesh
from autopipe.engine.step.microbatch import MicroBatch
from autopipe.engine.transport.p2p import MessageSpec, TensorSpec, Transport
from autopipe.engine.transport.peers import Peers
from autopipe.errors import EngineError

_SAID_BYTES = 1024
_SAID = MessageSpec([TensorSpec(shape=(_SAID_BYTES,), dtype=torch.uint8, stride=(1,))])
NOTHING = -(2**62)
"""Below every digest."""


def compare_calls(
    peers: Peers, kind: str, training: bool, given: Sequence[MicroBatch], *, shared: bool
) -> CallComparison | NeighbourComparison:
    """Start comparing a call with the other ranks: with different calls or batches they would wait for each other.

    Args:
        given: the micro-batches of the whole batch that this rank was given.
        shared: all ranks have to be given the same batch; otherwise only those of a replica.
    """
    call = "train in evaluation mode" if kind == "train" and not training else kind
    neighbours = peers.transport.neighbours(peers.mesh.shape.ranks) if peers.mesh.data_parallel == 1 else None
    if neighbours:
        return NeighbourComparison(peers.context, peers.transport, neighbours, call, given)
    return CallComparison(peers.context, peers.mesh, call, given, shared=shared)


_Described = tuple[str, tuple[int, ...], str]


def _described(call: str, given: Sequence[MicroBatch]) -> _Described:
    """A call, the samples of its micro-batches, and the signature of the first of them."""
    return call, tuple(m.num_samples for m in given), given[0].signature if given else ""


def _different(rank: int, call: object, other: int, its: object) -> EngineError:
    return EngineError(
        f"rank {rank} calls {call}, rank {other} calls {its}",
        expected="the same call with a batch of the same shape on every rank",
        remedy="give every rank the same batch; seed the sampler of the data loader equally",
    )


@lru_cache(maxsize=64)
def _said(described: _Described, signatures: tuple[str, ...]) -> Tensor:
    """The message about a call: a digest of it and of the signatures of all its micro-batches, and its description."""
    digest = zlib.crc32("|".join([described[0], *signatures]).encode())
    said = digest.to_bytes(8, "little") + str(described).encode()[: _SAID_BYTES - 8]
    return torch.frombuffer(bytearray(said.ljust(_SAID_BYTES)), dtype=torch.uint8)


class NeighbourComparison:
    """Compare a call with the ranks that this one exchanges tensors with; if one differs, all ranks are told."""

    def __init__(
        self,
        context: Context,
        transport: Transport,
        neighbours: Sequence[int],
        call: str,
        given: Sequence[MicroBatch],
    ) -> None:
        self._context, self._mine = context, _described(call, given)
        self._said = _said(self._mine, tuple(m.signature for m in given))
        for rank in neighbours:
            transport.send((context.rank, rank), [self._said], _SAID)
        self._heard = {rank: transport.recv((rank, context.rank), _SAID) for rank in neighbours}

    def finish(self) -> None:
        """Wait for the answers of the neighbours; the second time do nothing.

        Raises:
            EngineError: one makes another call; every rank is told.
            RuntimeError: the connection is lost.
        """
        heard, self._heard = self._heard, {}
        for rank, handle in heard.items():
            (said,) = handle.join()
            if torch.equal(said[:8], self._said[:8]):
                continue
            its = said[8:].numpy().tobytes().decode(errors="replace").rstrip()
            first, second = sorted([(rank, its), (self._context.rank, str(self._mine))])
            raise self._context.monitor.fail(_different(*first, *second))


class CallComparison:
    """Compare the digest of a call over all ranks.

    Args:
        call, given, shared: as in `compare_calls`.
    """

    def __init__(
        self, context: Context, mesh: ProcessMesh, call: str, given: Sequence[MicroBatch], *, shared: bool
    ) -> None:
        self._context, self._given, self._group = context, given, 0 if shared else mesh.replica
        self._call = call
        self._work: Any = None
        if context.control is not None:
            kind = zlib.crc32(self._call.encode())
            batch = zlib.crc32("|".join(m.signature for m in given).encode())
            self._bounds = torch.full((1 + mesh.data_parallel, 2), NOTHING)  # largest digest, and smallest negated
            self._bounds[0] = torch.tensor([kind, -kind])
            self._bounds[1 + self._group] = torch.tensor([batch, -batch])
            self._work = dist.all_reduce(self._bounds, dist.ReduceOp.MAX, group=context.control, async_op=True)

    def finish(self) -> None:
        """Wait for the answer of the others; the second time do nothing.

        Raises:
            EngineError: they make another call, on every rank.
            RuntimeError: the connection is lost.
        """
        work, self._work = self._work, None
        if work is None:
            return
        work.wait()
        compared = self._bounds[self._bounds[:, 0] != NOTHING]
        if torch.equal(compared[:, 0], -compared[:, 1]):
            return
        told = self._context.gather((self._group, _described(self._call, self._given)))
        rank, other = _first_difference(told)
        raise _different(other, told[other][1], rank, told[rank][1])


def _first_difference(told: Sequence[tuple[int, _Described]]) -> tuple[int, int]:
    """The first rank whose call differs from rank 0's, or whose batch differs from its group's; and the other rank."""
    first_of: dict[int, int] = {}
    for rank, (group, call) in enumerate(told):
        first = first_of.setdefault(group, rank)
        if call[0] != told[0][1][0]:
            return rank, 0
        if call != told[first][1]:
            return rank, first
    return 0, 0


class LossSum:
    """The sum of the weighted losses over all stages and replicas, on every rank, and whether any rank wants to stop.

    Args:
        num_due: losses that this rank's stages will make in this step.

    Attributes:
        stopping: any rank wants to stop; known after `finish`.
    """

    def __init__(self, context: Context, num_due: int) -> None:
        self._context, self._due = context, num_due
        self.stopping = False
        self._early = context.device.type == "cpu"  # on CUDA the host would wait for the last forward
        self._losses: list[Tensor] = []
        self._weights: list[float] = []
        self._work: Any = None

    def open(self) -> None:
        """Begin at the first backward if there is no loss to add: all ranks are known to make the same call by then."""
        if not self._due:
            self.start()

    def add(self, loss: Tensor, weight: float) -> None:
        """Add the detached loss of a micro-batch, with its share in the mean."""
        self._losses.append(loss)
        self._weights.append(weight)

    def start(self) -> None:
        """Begin to sum; all losses are there. The second time do nothing."""
        if self._early and self._work is None and self._context.control is not None:
            self._both = self._with_stop()
            self._work = dist.all_reduce(self._both, group=self._context.control, async_op=True)

    def _with_stop(self) -> Tensor:
        losses = torch.stack(self._losses).float().cpu() if self._losses else torch.zeros(0)
        total = (losses * torch.tensor(self._weights)).sum()  # a product of matrices would follow autocast
        return torch.stack([total, torch.tensor(float(self._context.preemption.asked))])

    def finish(self) -> Tensor:
        """The loss on the CPU. Collective.

        Raises:
            RuntimeError: the connection is lost.
        """
        if self._work is not None:
            self._work.wait()
        else:
            self._both = self._with_stop()
            if self._context.control is not None:
                dist.all_reduce(self._both, group=self._context.control)
        self.stopping = bool(self._both[1] > 0)
        return self._both[0].clone()
