"""Times one node on its device: forward, backward, and the memory it needs while it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from profiler.call import Call
from profiler.clock import Clock, clock_for, median_interval
from profiler.memory import peak_memory
from profiler.trace import Trace
from profiler.trial import Trial

MIN_REPEATS, MAX_REPEATS = 5, 200
"""Repeats of a node beside the warm-up; a node that takes over half a second is repeated three times at least, and not
warmed up again."""
TRIVIAL_US, LONG_S = 30.0, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Cost of one node.

    Attributes:
        forward_us, backward_us: medians.
        workspace_bytes: the most memory held beyond arguments, outputs and what is kept for backward.
        spread: relative half-width of the 95 % confidence interval of forward + backward.
        num_repeats: how often it was run.
    """

    forward_us: float
    backward_us: float
    workspace_bytes: int
    spread: float
    num_repeats: int


class NodeTimer:
    """Times nodes on one device.

    Args:
        device: where the tensors are.
        relative_error: the spread at which a node counts as measured.
    """

    def __init__(self, device: torch.device, relative_error: float) -> None:
        self._device, self._relative_error = device, relative_error
        self.clock = clock_for(device)
        self.backward_start_us = _backward_start_us(self.clock, device)

    def measure(
        self, call: Call, trace: Trace, tensors: Sequence[Tensor], own: Mapping[str, Tensor], budget_s: float
    ) -> Timing:
        """Times a node: a run that measures its memory, a warm-up, and repeats until the median is known well enough.

        Args:
            call: the node.
            trace: what a run of it did.
            tensors: its argument tensors.
            own: its module's own tensors.
            budget_s: time after which no further repeat starts.
        """
        trial = Trial(call=call, trace=trace, tensors=tensors, own=own)
        forward, backward = list[float](), list[float]()
        with call.with_own(own):
            start = time.perf_counter()
            workspace_bytes = _workspace_bytes(trial, self._device)
            deadline = time.perf_counter() + budget_s
            if deadline - budget_s - start < LONG_S:
                trial.run(self.clock)
            while True:
                f, b = trial.run(self.clock)
                forward.append(f)
                backward.append(max(0.0, b - self.backward_start_us) if trial.is_differentiated else 0.0)
                total = [f + b for f, b in zip(forward, backward, strict=True)]
                median, spread = median_interval(total)
                if self._is_enough(len(total), median, spread, time.perf_counter() > deadline, trial):
                    break
        return Timing(
            forward_us=median_interval(forward)[0],
            backward_us=median_interval(backward)[0],
            workspace_bytes=workspace_bytes,
            spread=spread,
            num_repeats=len(forward),
        )

    def _is_enough(self, count: int, median: float, spread: float, is_late: bool, trial: Trial) -> bool:
        if count < (3 if median > LONG_S * 1e6 else MIN_REPEATS):
            return False
        is_trivial = median < TRIVIAL_US and not trial.trace.new_bytes
        return is_late or is_trivial or spread <= self._relative_error or count >= MAX_REPEATS


def _workspace_bytes(trial: Trial, device: torch.device) -> int:
    """The first run: peak of forward and of backward, the gradients that go in and out included."""
    arguments = trial.arguments()
    with peak_memory(device) as peak:
        outputs = trial.forward(arguments)
        peak.split()
        trial.make_grads(outputs)
        peak.split()
        if trial.is_differentiated:
            trial.backward(outputs)
        given_bytes = trial.given_bytes
        del arguments, outputs
        trial.grads.clear()
    kept = sum(trial.trace.new_bytes) + trial.trace.saved_inside_bytes
    need = max(0, peak.within(0) - kept)
    return max(need, peak.within(2) + given_bytes) if trial.is_differentiated else need


def _backward_start_us(clock: Clock, device: torch.device) -> float:
    """Time of starting a backward pass at all: paid once a stage, so that it is taken off each node's."""
    leaf, grad = torch.zeros(1, device=device, requires_grad=True), torch.ones(1, device=device)
    times = []
    for _ in range(60):
        with torch.enable_grad():
            output = leaf.view(1)
        start = clock.mark()
        torch.autograd.grad([output], [leaf], [grad], allow_unused=True)
        times.append(clock.elapsed_us(start, clock.mark()))
    return median_interval(times[10:])[0]
