"""Moves tensors between stages: one two-rank group for each directed edge, order as the only matching, sends that do
not block.

The rules are those that NCCL needs; gloo and the channels of one host, which would allow more, are held to the same.
The numbers are those of the rules in docs/architecture.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, cached_property
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from autopipe.engine.ranks.context import Context
from autopipe.engine.transport.shm_buffers import MessageLayout
from autopipe.engine.transport.shm_channel import ShmReceiver, ShmSender
from autopipe.engine.transport.shm_setup import ShmChannels, close_channels, open_channels
from profiler import accelerator

Flow = tuple[int, int]
"""A directed edge between ranks: (from, to). Activations and gradients of one pair go over two flows (rule 3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Description of a message: both ends know it before it is sent (rule 7)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...] | None:
        """The dimensions from the slowest to the fastest, so that a permuted dense tensor travels as it lies in memory;
        None where that is the order in which they stand."""
        return _slowest_first(self.stride)


@dataclass(frozen=True, eq=False)
class MessageSpec:
    """The tensors of a message, which go together. One object stands for all messages of a kind; `repeated` ones come
    in every step."""

    tensors: Sequence[TensorSpec]
    repeated: bool = False

    @cached_property
    def layout(self) -> MessageLayout:
        """Their layout in a block of shared memory."""
        tensors = [(t.shape, _new(t, torch.device("meta")).stride(), t.dtype) for t in self.tensors]
        return MessageLayout(tensors, repeated=self.repeated)

    @cached_property
    def travels(self) -> bool:
        """Whether there is anything to be sent: tensors without elements are not."""
        return any(math.prod(t.shape) for t in self.tensors)


class Handle(Protocol):
    """A message on its way."""

    def join(self) -> list[Tensor]:
        """Waits: on a CPU the host, on CUDA the current stream (rule 9). Gives the tensors, of a receive."""
        ...

    def done(self) -> bool:
        """Whether all has arrived; does not block."""
        ...


@dataclass(slots=True)
class Works:
    """A message that torch moves: its works, the tensors that it fills, and those that must live until it is gone."""

    works: list[Any]
    tensors: list[Tensor]
    held: list[Tensor] = field(default_factory=list)

    def join(self) -> list[Tensor]:
        """As `Handle` says."""
        for work in self.works:
            work.wait()
        if self.tensors and accelerator.is_accelerator(self.tensors[0].device):
            for tensor in self.tensors:
                accelerator.keep_for(tensor, accelerator.current_stream(tensor.device))
        self.works, self.held = [], []
        return self.tensors

    def done(self) -> bool:
        """As `Handle` says."""
        return all(work.is_completed() for work in self.works)


class Transport:
    """Sends and receives of one rank, by the numbered rules of `docs/architecture.md`."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._groups: dict[Flow, Any] = {}
        self._channels: ShmChannels = {}
        self._streams: dict[Flow, Any] = {}

    def open(self, flows: Sequence[Flow]) -> None:
        """Makes and warms up the groups of flows that are new. Collective: all ranks call it with the same flows (rules
        1, 6).

        On CPUs, ranks of one host have a channel instead, and one the other way, unless AUTOPIPE_SHARED_MEMORY=0.
        """
        new = sorted(set(flows) - self._groups.keys() - self._channels.keys())
        if new and self._context.device.type == "cpu":
            both = {*new, *((b, a) for a, b in new)} - self._channels.keys()
            self._channels |= open_channels(sorted(both), self._context)
            new = [flow for flow in new if flow not in self._channels]
        for flow in new:
            self._groups[flow] = self._context.new_group(flow)
        for flow in new:
            if self._context.rank in flow:
                if accelerator.is_accelerator(self._context.device):
                    self._streams[flow] = accelerator.new_stream(self._context.device)
                self._warm_up(flow)

    def neighbours(self, ranks: Sequence[int]) -> list[int] | None:
        """The ranks to which this one has channels, where channels lead from each of `ranks` to each; None where they
        do not."""
        reached, ends = {ranks[0]}, [f for f in self._channels if f[0] in ranks and f[1] in ranks]
        while grown := {b for a, b in ends if a in reached} - reached:
            reached |= grown
        if reached != set(ranks):
            return None
        return sorted(b for a, b in ends if a == self._context.rank)

    def _warm_up(self, flow: Flow) -> None:
        one = MessageSpec([TensorSpec(shape=(1,), dtype=torch.uint8, stride=(1,))])
        if self._context.rank == flow[0]:
            self.send(flow, [torch.zeros(1, dtype=torch.uint8, device=self._context.device)], one).join()
        else:
            self.recv(flow, one).join()
        if accelerator.is_accelerator(self._context.device):
            accelerator.synchronize(self._context.device)

    def send(self, flow: Flow, tensors: Sequence[Tensor], spec: MessageSpec) -> Handle:
        """Starts sending; the tensors are kept until the handle is joined or dropped, and must not be written meanwhile
        (rule 10)."""
        if not spec.travels:
            return Works([], [])
        channel = self._channels.get(flow)
        if isinstance(channel, ShmSender):
            channel.send(tensors, spec.layout)
            return Works([], [])
        flat = [as_bytes(_as_it_lies(t.detach(), s)) for t, s in zip(tensors, spec.tensors, strict=True) if t.numel()]
        stream = self._streams.get(flow)
        if stream is not None:  # which waits for the producer alone: a send is issued right after it (rule 5)
            stream.wait_event(accelerator.current_stream(self._context.device).record_event())
            for t in flat:
                accelerator.keep_for(t, stream)
        with self._side(flow):
            return Works(self._issue("send", flow, flat), [], flat)

    def recv(self, flow: Flow, spec: MessageSpec) -> Handle:
        """Starts receiving into new tensors; from a channel they are made once the message is there."""
        channel = self._channels.get(flow)
        if isinstance(channel, ShmReceiver) and spec.travels:
            return channel.expect(spec.layout)
        # torch's allocator keeps memory by stream: a receive waits for no compute but those that have read what it is
        # given
        with self._side(flow):
            tensors = [_new(s, self._context.device) for s in spec.tensors]
            if not spec.travels:
                return Works([], tensors)
            flat = [as_bytes(_as_it_lies(t, s)) for t, s in zip(tensors, spec.tensors, strict=True) if t.numel()]
            return Works(self._issue("recv", flow, flat), tensors)

    def _side(self, flow: Flow) -> AbstractContextManager[Any]:
        """On CUDA the flow's own stream (rule 5)."""
        stream = self._streams.get(flow)
        return nullcontext() if stream is None else accelerator.on_stream(self._context.device, stream)

    def _issue(self, operation: Literal["send", "recv"], flow: Flow, flat: list[Tensor]) -> list[Any]:
        """Unbatched operations, always (rule 2)."""
        group = self._groups[flow]
        # what dist.isend and irecv end in, without what they ask about the group each time
        call = group.send if operation == "send" else group.recv
        peer = (flow[1] if operation == "send" else flow[0]) == max(flow)  # its rank in the group of two
        return [call([t], int(peer), 0) for t in flat]

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Gives every rank the tensor of rank `source`; small, on the CPU."""
        if self._context.control is None:
            return tensor
        value = tensor.detach().to("cpu")
        with self.waiting():
            dist.broadcast(value, source, group=self._context.control)
        return value

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        """Sums (or reduces by `op`) a tensor in place over a group, the control group where none is given."""
        if self._context.control is not None:
            with self.waiting():
                dist.all_reduce(tensor, op, group=group or self._context.control)

    def waiting(self) -> AbstractContextManager[None]:
        """Around what waits for other ranks."""
        return self._context.monitor.waiting()

    def new_group(self, ranks: Sequence[int]) -> Any:
        """A group for collectives among some ranks. Collective over all ranks."""
        return self._context.new_group(ranks, timeout=timedelta(minutes=30))

    def close(self) -> None:
        """Forgets the groups, which the context destroys, and closes the channels."""
        self._groups.clear()
        close_channels(self._channels)
        self._channels.clear()


def _new(spec: TensorSpec, device: torch.device) -> Tensor:
    """An empty dense tensor with the strides of a spec's order."""
    if spec.order is None:
        return torch.empty(spec.shape, dtype=spec.dtype, device=device)
    dense = torch.empty([spec.shape[d] for d in spec.order], dtype=spec.dtype, device=device)
    return dense.permute(_inverse(spec.order))


def _as_it_lies(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """A contiguous view of a dense tensor, a contiguous copy of another."""
    return (tensor if spec.order is None else tensor.permute(spec.order)).contiguous()


@cache
def _slowest_first(stride: tuple[int, ...]) -> tuple[int, ...] | None:
    order = tuple(sorted(range(len(stride)), key=lambda d: (-stride[d], d)))
    return None if order == tuple(range(len(stride))) else order


@cache
def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(d) for d in range(len(order)))


def as_bytes(tensor: Tensor) -> Tensor:
    """A dense tensor as bytes: every dtype travels, whatever the backend knows."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.reshape(-1).view(torch.uint8)
