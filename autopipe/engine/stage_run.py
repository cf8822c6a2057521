"""One rank's stage during one step: what it keeps of each micro-batch between its forward and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autopipe.engine.batch import MicroBatch
from autopipe.engine.clock import StepClock
from autopipe.engine.programs import Program
from autopipe.engine.transport import Flow, Handle, Transport
from autopipe.schedule import Action
from autopipe.stages import MODEL_INPUT


@dataclass(slots=True)
class _Saved:
    """What a micro-batch leaves between forward and backward."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    loss: Tensor | None


@dataclass(slots=True, kw_only=True)
class StageRun:
    """Executes the actions of one stage.

    Attributes:
        stage: the stage of this rank.
        programs: for each micro-batch, what is run.
        microbatches, weights: the micro-batches and their shares in the mean loss.
        transport: moves tensors between stages.
        rank_of: the rank of each stage.
        training: keep what the backward needs.
        with_target: the graph takes the target among its inputs.
        clock: times what runs.
        loss: the weighted sum of the losses so far, on the stage that makes the loss.
        results: the graph's outputs of each micro-batch that this stage holds, for `predict`.
    """

    stage: int
    programs: Sequence[Program]
    microbatches: Sequence[MicroBatch]
    weights: Sequence[float]
    transport: Transport
    rank_of: Sequence[int]
    training: bool
    with_target: bool
    clock: StepClock
    loss: Tensor | None = None
    results: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    _receiving: dict[Action, Handle] = field(default_factory=dict)
    _sending: dict[int, list[tuple[int, Handle]]] = field(default_factory=dict)
    _gradients: list[Handle] = field(default_factory=list)
    _saved: dict[int, _Saved] = field(default_factory=dict)
    _input_gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def flow(self, source: int, target: int) -> Flow:
        """The flow of tensors from one stage to another."""
        return self.rank_of[source], self.rank_of[target]

    def receive(self, action: Action) -> None:
        """Posts a receive; the compute that needs it joins it."""
        program = self.programs[action.microbatch]
        if action.kind == "RECV_F":
            message = program.forward_message(action.peer, self.stage)
        else:
            message = program.backward_message(self.stage, action.peer)
        self._receiving[action] = self.transport.recv(self.flow(action.peer, self.stage), message)
        self._drop_finished()

    def forward(self, m: int) -> None:
        """Runs the forward of micro-batch m."""
        program = self.programs[m]
        given = self.microbatches[m].tensors(self.with_target)
        received: dict[str, Tensor] = {}
        for source in sorted({i.source for i in program.specs[self.stage].inputs} - {MODEL_INPUT}):
            action = Action("RECV_F", self.stage, m, source)
            handle = self._receiving.pop(action)
            names = [i.name for i in program.specs[self.stage].received_from(source)]
            with self.clock.span(action, waiting=True):
                received |= dict(zip(names, handle.join(), strict=True))
        inputs = []
        for spec in program.specs[self.stage].inputs:
            if spec.source == MODEL_INPUT:
                inputs.append(given[spec.position])
            else:
                inputs.append(received[spec.name].requires_grad_(spec.gradient and self.training))
        with self.clock.span(Action("F", self.stage, m)):
            values: tuple[Tensor, ...] = program.module(*inputs)
        self._keep(m, inputs, list(values))

    def _keep(self, m: int, inputs: list[Tensor], values: list[Tensor]) -> None:
        program = self.programs[m]
        spec = program.specs[self.stage]
        outputs, results = values[: len(spec.outputs)], values[len(spec.outputs) :]
        loss = None
        held = dict(zip(spec.results, results, strict=True))
        if program.loss_stage == self.stage:
            assert program.captured.loss is not None
            loss = held.pop(program.captured.loss).float() * self.weights[m]
            share = loss.detach()
            self.loss = share if self.loss is None else self.loss + share
        if not self.training:
            self.results[m] = held
            self._saved.clear()  # the sends of earlier micro-batches have started, and hold their tensors
        self._saved[m] = _Saved(inputs, outputs, loss)

    def send_forward(self, action: Action) -> None:
        """Starts sending the activations that one later stage reads."""
        m = action.microbatch
        program, saved = self.programs[m], self._saved[m]
        tensors = [saved.outputs[i] for i in program.specs[self.stage].sent_to(action.peer)]
        message = program.forward_message(self.stage, action.peer)
        handle = self.transport.send(self.flow(self.stage, action.peer), tensors, message)
        self._sending.setdefault(m, []).append((action.peer, handle))

    def backward(self, m: int) -> None:
        """Runs the backward of micro-batch m; parameters accumulate their gradients."""
        saved, program = self._saved.pop(m), self.programs[m]
        spec = program.specs[self.stage]
        roots: list[Tensor] = []
        gradients: list[Tensor | None] = []
        if saved.loss is not None:
            roots.append(saved.loss)
            gradients.append(None)
        sums, answered = self._join_gradients(m)
        for output, value in zip(spec.outputs, saved.outputs, strict=True):
            if output.name in sums and value.requires_grad:
                roots.append(value)
                gradients.append(sums[output.name])
        for target, handle in self._sending.get(m, ()):
            if target in answered:
                handle.join()  # its gradient came back, so the activation was consumed: this cannot block
        with self.clock.span(Action("B", self.stage, m)):
            if roots:
                torch.autograd.backward(roots, gradients)
        self._input_gradients[m] = {
            i.name: _gradient_of(v) for i, v in zip(spec.inputs, saved.inputs, strict=True) if i.gradient
        }

    def _join_gradients(self, m: int) -> tuple[dict[str, Tensor], set[int]]:
        """The gradient of each output, summed over the stages that read it in their order; and the stages that sent any."""
        program, sums, answered = self.programs[m], dict[str, Tensor](), set[int]()
        outputs = program.specs[self.stage].outputs
        for target in sorted({t for o in outputs if o.gradient for t in o.targets}):
            action = Action("RECV_B", self.stage, m, target)
            if action not in self._receiving:
                continue
            answered.add(target)
            names = [i.name for i in program.specs[target].received_from(self.stage) if i.gradient]
            with self.clock.span(action, waiting=True):
                gradients = self._receiving.pop(action).join()
            for name, gradient in zip(names, gradients, strict=True):
                sums[name] = sums[name] + gradient if name in sums else gradient
        return sums, answered

    def send_backward(self, action: Action) -> None:
        """Starts sending the gradients of what came from one earlier stage."""
        m = action.microbatch
        program, gradients = self.programs[m], self._input_gradients[m]
        names = [i.name for i in program.specs[self.stage].received_from(action.peer) if i.gradient]
        message = program.backward_message(action.peer, self.stage)
        handle = self.transport.send(self.flow(self.stage, action.peer), [gradients.pop(n) for n in names], message)
        self._gradients.append(handle)

    def _drop_finished(self) -> None:
        """Forgets sends that have arrived, so that buffers grow with the stages and not with the micro-batches."""
        self._gradients = [h for h in self._gradients if not h.done()]
        for m, sends in list(self._sending.items()):
            self._sending[m] = [(target, h) for target, h in sends if not h.done()]
            if not self._sending[m]:
                del self._sending[m]

    def finish(self) -> None:
        """Joins what is still on its way."""
        for handle in [*self._gradients, *(h for sends in self._sending.values() for _, h in sends)]:
            handle.join()
        self._gradients.clear()
        self._sending.clear()


def _gradient_of(value: Any) -> Tensor:
    gradient = value.grad
    value.grad = None
    return torch.zeros_like(value) if gradient is None else gradient
