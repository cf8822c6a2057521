"""One stage during one step: what it keeps of each micro-batch between its forward and its backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from autopipe.capture.seeding import RandomSource
from autopipe.engine.batch import MicroBatch
from autopipe.engine.clock import StepClock
from autopipe.engine.layout import Layout
from autopipe.engine.programs import Program
from autopipe.engine.split_backward import WeightGradients, input_gradients
from autopipe.engine.transport import Flow, Handle, Transport
from autopipe.schedule import Action
from autopipe.stages import MODEL_INPUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What the stages of one rank share during a step.

    Attributes:
        programs: for each of this replica's micro-batches, what is run.
        microbatches, weights: the micro-batches, and their shares in the mean loss of the whole batch.
        training: keep what the backward needs.
        with_target: the graphs take the target among their inputs.
        layout, transport: where stages run, and what moves tensors between them.
        clock: times what runs.
        random, seed, number, first_microbatch: what random operations follow from: the run's seed, the step's number, and the
            place of this replica's first micro-batch in the whole batch.
        loss_scale: losses are multiplied by it before the backward.
        local: tensors that go from one stage of this rank to another: (kind, from, to, micro-batch).
    """

    programs: Sequence[Program]
    microbatches: Sequence[MicroBatch]
    weights: Sequence[float]
    training: bool
    with_target: bool
    layout: Layout
    transport: Transport
    clock: StepClock
    random: RandomSource
    seed: int
    number: int
    first_microbatch: int
    loss_scale: float = 1.0
    local: dict[tuple[str, int, int, int], list[Tensor]] = field(default_factory=dict)

    def seed_for(self, m: int) -> None:
        """From now on random operations are those of micro-batch m."""
        self.random.set(self.seed, self.number, self.first_microbatch + m)


@dataclass(slots=True)
class _Saved:
    """What a micro-batch leaves between forward and backward."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    loss: Tensor | None


@dataclass(slots=True)
class StageRun:
    """Executes the actions of one stage.

    Attributes:
        stage: the stage.
        step: what it shares with the other stages of its rank.
        loss: the weighted sum of the losses so far, on the stage that makes the loss.
        results: the graph's outputs of each micro-batch that this stage holds, for `predict`.
    """

    stage: int
    step: Step
    loss: Tensor | None = None
    results: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    _receiving: dict[Action, Handle] = field(default_factory=dict)
    _outgoing: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    _sending: dict[int, list[tuple[int, Handle]]] = field(default_factory=dict)
    _gradients: list[Handle] = field(default_factory=list)
    _saved: dict[int, _Saved] = field(default_factory=dict)
    _weights: dict[int, WeightGradients] = field(default_factory=dict)
    _input_gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def _flow(self, source: int, target: int) -> Flow:
        return self.step.layout.rank_of(source), self.step.layout.rank_of(target)

    # -- forward ------------------------------------------------------------------------------------------------------

    def receive(self, action: Action) -> None:
        """Posts a receive; the compute that needs it joins it."""
        program = self.step.programs[action.microbatch]
        if action.kind == "RECV_F":
            message = program.forward_message(action.peer, self.stage)
        else:
            message = program.backward_message(self.stage, action.peer)
        self._receiving[action] = self.step.transport.recv(self._flow(action.peer, self.stage), message)
        self._drop_finished()

    def _arrived(self, kind: Any, m: int, source: int) -> list[Tensor] | None:
        """The tensors of a receive, waited for; of a stage on this rank, what it has left; None where nothing was due."""
        if self.step.layout.is_mine(source):
            return self.step.local.pop((kind, source, self.stage, m), None)
        action = Action(kind, self.stage, m, source)
        handle = self._receiving.pop(action, None)
        if handle is None:
            return None
        with self.step.clock.span(action, waiting=True):
            return handle.join()

    def forward(self, m: int) -> None:
        """Runs the forward of micro-batch m."""
        program = self.step.programs[m]
        spec = program.specs[self.stage]
        given = self.step.microbatches[m].tensors(self.step.with_target)
        received: dict[str, Tensor] = {}
        for source in sorted({i.source for i in spec.inputs} - {MODEL_INPUT}):
            names = [i.name for i in spec.received_from(source)]
            received |= dict(zip(names, self._arrived("RECV_F", m, source) or [], strict=True))
        inputs = [
            given[i.position]
            if i.source == MODEL_INPUT
            else received[i.name].requires_grad_(i.gradient and self.step.training)
            for i in spec.inputs
        ]
        self.step.seed_for(m)
        with self.step.clock.span(Action("F", self.stage, m)):
            values: tuple[Tensor, ...] = program.modules[self.stage](*inputs)
        self._keep(m, inputs, list(values))

    def _keep(self, m: int, inputs: list[Tensor], values: list[Tensor]) -> None:
        program = self.step.programs[m]
        spec = program.specs[self.stage]
        outputs, results = values[: len(spec.outputs)], values[len(spec.outputs) :]
        loss = None
        held = dict(zip(spec.results, results, strict=True))
        if program.loss_stage == self.stage:
            assert program.captured.loss is not None
            loss = held.pop(program.captured.loss).float() * self.step.weights[m]
            share = loss.detach()
            self.loss = share if self.loss is None else self.loss + share
        if self.step.training:
            self._saved[m] = _Saved(inputs, outputs, loss)
        else:
            self.results[m] = held
        for target in sorted({t for o in spec.outputs for t in o.targets}):
            tensors = [outputs[i].detach() for i in spec.sent_to(target)]
            if self.step.layout.is_mine(target):
                self.step.local["RECV_F", self.stage, target, m] = tensors
            else:
                self._outgoing[m, target] = tensors

    def send_forward(self, action: Action) -> None:
        """Starts sending the activations that one later stage reads."""
        m = action.microbatch
        tensors = self._outgoing.pop(
            (m, action.peer), []
        )  # none where only other micro-batches of the step use this edge
        message = self.step.programs[m].forward_message(self.stage, action.peer)
        handle = self.step.transport.send(self._flow(self.stage, action.peer), tensors, message)
        self._sending.setdefault(m, []).append((action.peer, handle))

    # -- backward -----------------------------------------------------------------------------------------------------

    def backward(self, m: int) -> None:
        """Runs the backward of micro-batch m; parameters accumulate their gradients."""
        with self._backward(m, "B") as (roots, gradients, _):
            if roots:
                torch.autograd.backward(roots, gradients)

    def input_gradients(self, m: int) -> None:
        """Runs the part of the backward of micro-batch m that earlier stages wait for."""
        with self._backward(m, "I") as (roots, gradients, inputs):
            division = self.step.programs[m].divisions[self.stage]
            self._weights[m] = input_gradients(roots, gradients, inputs, division)

    def weight_gradients(self, m: int) -> None:
        """Runs what is left of the backward of micro-batch m."""
        self.step.seed_for(m)
        with self.step.clock.span(Action("W", self.stage, m)):
            self._weights.pop(m).run()

    @contextlib.contextmanager
    def _backward(
        self, m: int, kind: Literal["B", "I"]
    ) -> Iterator[tuple[list[Tensor], list[Tensor | None], list[Tensor]]]:
        """Gives what is differentiated, the gradients that have arrived for it, and the inputs whose gradients it is to leave."""
        saved, spec = self._saved.pop(m), self.step.programs[m].specs[self.stage]
        roots: list[Tensor] = []
        gradients: list[Tensor | None] = []
        if saved.loss is not None:
            roots.append(saved.loss * self.step.loss_scale if self.step.loss_scale != 1.0 else saved.loss)
            gradients.append(None)
        sums, answered = self._join_gradients(m)
        for output, value in zip(spec.outputs, saved.outputs, strict=True):
            if output.name in sums and value.requires_grad:
                roots.append(value)
                gradients.append(sums[output.name])
        for target, handle in self._sending.get(m, ()):
            if target in answered:
                handle.join()  # its gradient came back, so the activation was consumed: this cannot block
        self.step.seed_for(m)
        inputs = {i.name: v for i, v in zip(spec.inputs, saved.inputs, strict=True) if i.gradient}
        with self.step.clock.span(Action(kind, self.stage, m)):
            yield roots, gradients, list(inputs.values())
        self._keep_gradients(m, {name: _gradient_of(v) for name, v in inputs.items()})

    def _join_gradients(self, m: int) -> tuple[dict[str, Tensor], set[int]]:
        """The gradient of each output, summed over the stages that read it in their order; and the stages that sent any."""
        program, sums, answered = self.step.programs[m], dict[str, Tensor](), set[int]()
        outputs = program.specs[self.stage].outputs
        for target in sorted({t for o in outputs if o.gradient for t in o.targets}):
            gradients = self._arrived("RECV_B", m, target)
            if gradients is None:
                continue
            answered.add(target)
            names = [i.name for i in program.specs[target].received_from(self.stage) if i.gradient]
            for name, gradient in zip(names, gradients, strict=True):
                sums[name] = sums[name] + gradient if name in sums else gradient
        return sums, answered

    def _keep_gradients(self, m: int, gradients: Mapping[str, Tensor]) -> None:
        spec = self.step.programs[m].specs[self.stage]
        self._input_gradients[m] = dict(gradients)
        for source in sorted({i.source for i in spec.inputs if i.gradient and self.step.layout.is_mine(i.source)}):
            names = [i.name for i in spec.received_from(source) if i.gradient]
            self.step.local["RECV_B", self.stage, source, m] = [self._input_gradients[m].pop(n) for n in names]

    def send_backward(self, action: Action) -> None:
        """Starts sending the gradients of what came from one earlier stage."""
        m = action.microbatch
        program, gradients = self.step.programs[m], self._input_gradients[m]
        names = [i.name for i in program.specs[self.stage].received_from(action.peer) if i.gradient]
        message = program.backward_message(action.peer, self.stage)
        tensors = [gradients.pop(n) for n in names]
        self._gradients.append(self.step.transport.send(self._flow(self.stage, action.peer), tensors, message))

    # -- buffers ------------------------------------------------------------------------------------------------------

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
