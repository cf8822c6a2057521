"""Choice of the flows that go over shared memory: those between ranks that share a host and can reach each other's
sockets."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from autopipe.engine.failures.interrupt import available
from autopipe.engine.failures.process_state import host_identity
from autopipe.engine.ranks.context import Context
from autopipe.engine.transport.shm_buffers import MessageLayout
from autopipe.engine.transport.shm_channel import ShmReceiver, ShmSender
from profiler.links import LinkTransport

_LOG = logging.getLogger("autopipe.engine")
Flow = tuple[int, int]
ShmChannels = dict[Flow, ShmReceiver | ShmSender | None]
"""This rank's end of each channel; None where both ends are other ranks."""


def open_channels(flows: Sequence[Flow], context: Context) -> ShmChannels:
    """The channels among the flows; those left need a group. Collective."""
    wanted = available() and os.environ.get("AUTOPIPE_SHARED_MEMORY", "1") != "0"
    hosts = context.gather(host_identity() if wanted else None)
    local = [f for f in flows if hosts[f[0]] is not None and hosts[f[0]] == hosts[f[1]]]
    if not local:
        return {}
    inboxes = {f: ShmReceiver(context.alarm) for f in local if f[1] == context.rank}
    addresses = {f: a for part in context.gather({f: i.address for f, i in inboxes.items()}) for f, a in part.items()}
    outboxes: dict[Flow, ShmSender] = {}
    failures: dict[Flow, str] = {}
    for flow in (f for f in local if f[0] == context.rank):
        try:
            outboxes[flow] = ShmSender(addresses[flow])
        except OSError as cause:
            failures[flow] = str(cause)
    failed = {f: why for part in context.gather(failures) for f, why in part.items()}
    for flow, why in failed.items():
        _LOG.warning("ranks %d and %d share a host and no memory, and use sockets: %s", *flow, why)
    for flow, receiver in inboxes.items():
        if flow in failed:
            receiver.close()
        else:
            receiver.accept()
    mine: dict[Flow, ShmReceiver | ShmSender] = {**inboxes, **outboxes}
    return {f: mine.get(f) for f in local if f not in failed}


def close_channels(channels: ShmChannels) -> None:
    """Closes this rank's ends."""
    for end in channels.values():
        if end is not None:
            end.close()


def transport_over(channels: ShmChannels) -> LinkTransport | None:
    """The two channels between two ranks, as the profiler measures them; None where there are none."""
    if not channels:
        return None
    sender = next((end for end in channels.values() if isinstance(end, ShmSender)), None)
    receiver = next((end for end in channels.values() if isinstance(end, ShmReceiver)), None)

    @cache
    def packing_of(num_bytes: int) -> MessageLayout:
        return MessageLayout([((num_bytes,), (1,), torch.uint8)])

    def start(message: Tensor, is_sender: bool) -> Callable[[], object]:
        assert sender is not None and receiver is not None, "only the two ranks send"
        content = message.view(torch.uint8)
        if not is_sender:
            return receiver.expect(packing_of(content.numel()), lambda views: [content.copy_(views[0])]).join
        sender.send([content], packing_of(content.numel()))
        return lambda: None

    return LinkTransport(name="shared memory", start=start, buffered=True)
