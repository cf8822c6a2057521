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


class CallComparison:
    """Ranks that were given different calls or batches would wait for each other: the ranks of a replica compare a digest first."""

    def __init__(self, layout: Layout, kind: str, training: bool, microbatches: Sequence[MicroBatch]) -> None:
        self._layout, self._kind, self._microbatches = layout, kind, microbatches
        self._work: Any = None
        if layout.pipeline_control is not None:
            text = "|".join([kind, str(training), *(m.signature for m in microbatches)])
            digest = zlib.crc32(text.encode())
            self._bounds = torch.tensor([digest, -digest])
            self._work = dist.all_reduce(self._bounds, dist.ReduceOp.MAX, group=layout.pipeline_control, async_op=True)

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
        if self._bounds[0] == -self._bounds[1]:
            return
        calls: list[Any] = [None] * self._layout.num_ranks
        mine = (
            self._kind,
            [m.num_samples for m in self._microbatches],
            self._microbatches[0].signature if self._microbatches else "",
        )
        dist.all_gather_object(calls, mine, group=self._layout.pipeline_control)
        ranks = sorted(self._layout.shape.replicas[self._layout.replica])
        other = next((i for i, c in enumerate(calls) if c != calls[0]), 0)
        raise EngineError(
            f"rank {ranks[0]} calls {calls[0]}, rank {ranks[other]} calls {calls[other]}",
            expected="the same call with a batch of the same shape on every rank",
            remedy="give every rank the same batch; seed the sampler of the data loader equally",
        )


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
