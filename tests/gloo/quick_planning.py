"""Planning without measuring, for tests of what a pipeline computes: nodes cost what their bytes say.

The costs are the same on every machine. The planner searches too, for a shorter time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import profiler
import profiler.api
from autopipe.engine.setup import auto_plan, planning
from autopipe.partition import partition
from profiler.call import Call
from profiler.links import LinkTransport
from profiler.nodes import NodeTimer, Timing, _workspace_bytes
from profiler.records import LinkProfile
from profiler.trace import Trace
from profiler.trial import Trial

BYTES_PER_US = 1000.0
CUT_BUDGET_S, SEARCH_BUDGET_S = 0.02, 0.2
"""Seconds of the search for a cut, and of that for a layout, counted in work done."""


class _BytesTimer(NodeTimer):
    """Measures a node's memory; its time follows from the bytes that it reads and writes."""

    def measure(
        self, call: Call, trace: Trace, tensors: Sequence[Tensor], own: Mapping[str, Tensor], budget_s: float
    ) -> Timing:
        trial = Trial(call=call, trace=trace, tensors=tensors, own=own)
        with call.with_own(own):
            workspace_bytes = _workspace_bytes(trial, self._device)
        num_bytes = sum(t.nbytes for t in (*tensors, *own.values())) + sum(trace.new_bytes)
        forward_us = 1.0 + num_bytes / BYTES_PER_US
        backward_us = 2 * forward_us if trial.is_differentiated else 0.0
        return Timing(
            forward_us=forward_us,
            backward_us=backward_us,
            workspace_bytes=workspace_bytes,
            spread=0.0,
            num_repeats=1,
        )


def _link(
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str | None = None,
    cache: bool = True,
    way: LinkTransport | None = None,
) -> LinkProfile:
    buffered = way is not None and way.buffered
    return LinkProfile(latency_us=20.0, bytes_per_us=2000.0, overlap=0.5, buffered=buffered)


@contextlib.contextmanager
def quick_planning() -> Iterator[None]:
    """Lets the engine plan by `BYTES_PER_US` and a link that is made up, in this process."""
    with contextlib.ExitStack() as patches:
        for place, name, value in (
            (profiler, "profile", partial(profiler.profile, cache=False, calibrate=False)),
            (profiler.api, "NodeTimer", _BytesTimer),
            (profiler, "measure_link", _link),
            (planning, "partition", partial(partition, time_budget_s=CUT_BUDGET_S)),
            (auto_plan, "SEARCH_BUDGET_S", SEARCH_BUDGET_S),
        ):
            patches.enter_context(mock.patch.object(place, name, value))
        yield
