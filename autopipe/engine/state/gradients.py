"""Gradients of one training step: summed over tied stages and over replicas, then added to those of earlier calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from autopipe.engine.failures.monitor import RankMonitor
from autopipe.engine.state.parameters import StageParameters, zero_gradient
from autopipe.engine.state.replicas import Replicas


class GradientSync:
    """Sums the gradients of this rank's stages with those of other ranks, at the places where the schedule says so.

    Attributes:
        tie_groups: the sets of stages that share parameters; the schedule reduces each by its number.
    """

    def __init__(self, parameters: StageParameters, replicas: Replicas, monitor: RankMonitor) -> None:
        self._parameters, self._replicas, self._monitor = parameters, replicas, monitor
        self.tie_groups = tuple(parameters.tie_groups)

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Around the backwards of one training call.

        The gradients of earlier calls are set aside, so that tied parameters are summed over their stages exactly once,
        and added again at the end: two calls give exactly twice the gradient.
        """
        earlier = self._parameters.set_aside()
        yield
        self._start(self._parameters.tied_here())
        with self._monitor.waiting("summing the gradients of the replicas"):
            self._replicas.finish_reduce()
            self._replicas.share_buffers(self._parameters.buffers())
        self._parameters.put_back(earlier)

    def reduce_tied(self, group: int) -> None:
        """Sum the gradients of one group of tied parameters over the stages that hold them."""
        with self._monitor.waiting("summing the gradients of tied parameters"):
            self._parameters.reduce_tied(group)

    def stage_done(self, stage: int) -> None:
        """Start summing a stage's gradients over the replicas: its last backward has run."""
        self._start(self._parameters.of_stage(stage, tied=False))

    def _start(self, parameters: list[nn.Parameter]) -> None:
        """Start summing over the replicas; a parameter that only other replicas have used counts as zero here."""
        if self._replicas.single:
            return
        with self._monitor.waiting("summing the gradients of the replicas"):
            used_anywhere = self._replicas.used_anywhere(parameters)
        used = [p for p, u in zip(parameters, used_anywhere, strict=True) if u]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = zero_gradient(parameter)
        self._replicas.start_reduce(used)
