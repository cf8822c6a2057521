"""What the ranks say to each other in every step beside tensors: that they make the same call, and what the loss is.

On a CPU both are collectives that run beside the computes: the comparison is waited for before the first transfer, and the loss
is summed from the last forward on.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopipe.engine.batch import MicroBatch
from autopipe.engine.context import Context
from autopipe.engine.layout import Layout
from autopipe.errors import EngineError

NOTHING = -(2**62)
"""Below every digest."""


class CallComparison:
    """Ranks that were given different calls or batches would wait for each other, so that digests are compared first.

    Args:
        given: the micro-batches of all that this rank was given.
        shared: all ranks were to be given the same; otherwise those of a replica were.
    """

    def __init__(
        self, context: Context, layout: Layout, kind: str, training: bool, given: Sequence[MicroBatch], *, shared: bool
    ) -> None:
        self._context, self._given, self._group = context, given, 0 if shared else layout.replica
        self._call = "train in evaluation mode" if kind == "train" and not training else kind
        self._work: Any = None
        if context.control is not None:
            call = zlib.crc32(self._call.encode())
            batch = zlib.crc32("|".join(m.signature for m in given).encode())
            self._bounds = torch.full((1 + layout.data_parallel, 2), NOTHING)  # largest digest, and smallest negated
            self._bounds[0] = torch.tensor([call, -call])
            self._bounds[1 + self._group] = torch.tensor([batch, -batch])
            self._work = dist.all_reduce(self._bounds, dist.ReduceOp.MAX, group=context.control, async_op=True)

    def finish(self) -> None:
        """Waits for the answer of the others; the second time it does nothing.

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
        mine = (
            self._call,
            [m.num_samples for m in self._given],
            self._given[0].signature if self._given else "",
        )
        told = self._context.gather((self._group, mine))
        rank, other = _first_difference(told)
        raise EngineError(
            f"rank {other} calls {told[other][1]}, rank {rank} calls {told[rank][1]}",
            expected="the same call with a batch of the same shape on every rank",
            remedy="give every rank the same batch; seed the sampler of the data loader equally",
        )


def _first_difference(told: Sequence[tuple[int, tuple[str, list[int], str]]]) -> tuple[int, int]:
    """The first rank that makes another call than rank 0, or was given other micro-batches than the first of its group; and that one."""
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
        self._sum = torch.zeros((), device=context.device)
        self._open = False
        self._work: Any = None

    def open(self) -> None:
        """From now on the ranks are known to make the same call."""
        self._open = True
        self._start_if_complete()

    def add(self, share: Tensor) -> None:
        """A micro-batch's share, detached."""
        self._sum = self._sum + share
        self._due -= 1
        self._start_if_complete()

    def _start_if_complete(self) -> None:
        ready = self._open and self._due == 0 and self._work is None
        if ready and self._early and self._context.control is not None:
            self._both = self._with_stop()
            self._work = dist.all_reduce(self._both, group=self._context.control, async_op=True)

    def _with_stop(self) -> Tensor:
        return torch.stack([self._sum.to("cpu"), torch.tensor(float(self._context.preemption.asked))])

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
