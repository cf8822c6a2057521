"""Executes one stage during one step, and keeps what each micro-batch needs between its forward and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autopipe.capture.seeding import RandomSource
from autopipe.engine.ranks.mesh import ProcessMesh
from autopipe.engine.step.call_check import LossSum
from autopipe.engine.step.clock import StepClock
from autopipe.engine.step.microbatch import MicroBatch
from autopipe.engine.step.programs import Message, Program, Route
from autopipe.engine.step.split_backward import WeightGradients, input_gradients
from autopipe.engine.transport.p2p import Handle, Transport
from autopipe.schedule import Action
from autopipe.schedule.event_graph import MAX_POSTED_RECEIVES
from autopipe.stages import MODEL_INPUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The state that the stages of one rank share during a step.

    Attributes:
        programs: the program of each of this replica's micro-batches.
        microbatches, weights: the micro-batches, and their shares in the mean loss of the whole batch.
        training: keep what the backward needs.
        with_target: the graphs take the target among their inputs.
        mesh, transport: which rank runs which stage, and what moves tensors between them.
        clock: times what runs.
        random, seed, number, first_microbatch: random operations follow from the run's seed, the step's number, and the
            place of this replica's first micro-batch in the whole batch.
        loss: takes each micro-batch's share of the loss; None if no loss is asked for.
        loss_scale: losses are multiplied by it before the backward.
        local: tensors that go from one stage of this rank to another: (kind, from, to, micro-batch).
    """

    programs: Sequence[Program]
    microbatches: Sequence[MicroBatch]
    weights: Sequence[float]
    training: bool
    with_target: bool
    mesh: ProcessMesh
    transport: Transport
    clock: StepClock
    random: RandomSource
    seed: int
    number: int
    first_microbatch: int
    loss: LossSum | None
    loss_scale: float = 1.0
    local: dict[tuple[str, int, int, int], list[Tensor]] = field(default_factory=dict)

    def seed_for(self, m: int) -> None:
        """Seed the random operations that follow for micro-batch m."""
        self.random.set(self.seed, self.number, self.first_microbatch + m)


@dataclass(slots=True)
class _Saved:
    """Tensors that a micro-batch keeps between forward and backward."""

    inputs: list[Tensor]
    outputs: Sequence[Tensor]
    loss: Tensor | None


@dataclass(slots=True)
class StageRun:
    """Executes the actions of one stage.

    Attributes:
        stage: the stage.
        step: what it shares with the other stages of its rank.
        results: the graph's outputs of each micro-batch that this stage holds, for `predict`.
    """

    stage: int
    step: Step
    results: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    _receiving: dict[tuple[str, int, int], tuple[Action, Handle]] = field(default_factory=dict)
    _outgoing: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    _sending: dict[int, list[tuple[int, Handle]]] = field(default_factory=dict)
    _gradients: list[Handle] = field(default_factory=list)
    _saved: dict[int, _Saved] = field(default_factory=dict)
    _loss_gradients: dict[tuple[float, torch.Size, torch.dtype], Tensor] = field(default_factory=dict)
    _weights: dict[int, WeightGradients] = field(default_factory=dict)
    _input_gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def _route(self, m: int) -> Route:
        return self.step.programs[m].routes[self.stage]

    # -- forward ------------------------------------------------------------------------------------------------------

    def receive(self, action: Action) -> None:
        """Post a receive, which the compute that needs it joins. Nothing is due if only other micro-batches use it."""
        route = self._route(action.microbatch)
        due = (route.received if action.kind == "RECV_F" else route.gradients_received).get(action.peer)
        if due is not None and due.flow is not None:
            key = action.kind, action.microbatch, action.peer
            self._receiving[key] = action, self.step.transport.recv(due.flow, due.spec)
        self._drop_finished()

    def _arrived(self, kind: str, m: int, source: int, due: Message) -> list[Tensor] | None:
        """Wait for the tensors of a receive, or take those of a stage on this rank; None if nothing was posted."""
        if due.flow is None:
            return self.step.local.pop((kind, source, self.stage, m), None)
        posted = self._receiving.pop((kind, m, source), None)
        if posted is None:
            return None
        action, handle = posted
        with self.step.clock.span(action, waiting=True):
            return handle.join()

    def forward(self, action: Action) -> None:
        """Run the forward of a micro-batch."""
        m = action.microbatch
        program = self.step.programs[m]
        spec, route = program.specs[self.stage], program.routes[self.stage]
        given = self.step.microbatches[m].tensors(self.step.with_target) if route.reads_batch else []
        received: dict[str, Tensor] = {}
        for source, message in route.received.items():
            received.update(zip(message.names, self._arrived("RECV_F", m, source, message) or (), strict=True))
        inputs = [
            given[i.position]
            if i.source == MODEL_INPUT
            else received[i.name].requires_grad_(i.gradient and self.step.training)
            for i in spec.inputs
        ]
        self.step.seed_for(m)
        with self.step.clock.span(action):
            values: tuple[Tensor, ...] = program.modules[self.stage](*inputs)
        self._keep(m, inputs, values)

    def _keep(self, m: int, inputs: list[Tensor], values: Sequence[Tensor]) -> None:
        program = self.step.programs[m]
        spec = program.specs[self.stage]
        outputs, results = values[: len(spec.outputs)], values[len(spec.outputs) :]
        loss = None
        held = dict(zip(spec.results, results, strict=True))
        if program.loss_stage == self.stage:
            assert program.captured.loss is not None and self.step.loss is not None
            loss = held.pop(program.captured.loss)
            self.step.loss.add(loss.detach(), self.step.weights[m])
        if self.step.training:
            self._saved[m] = _Saved(inputs, outputs, loss)
        else:
            self.results[m] = held
        for target, message in program.routes[self.stage].sent.items():
            tensors = [outputs[i].detach() for i in message.places]
            if message.flow is None:
                self.step.local["RECV_F", self.stage, target, m] = tensors
            else:
                self._outgoing[m, target] = tensors

    def send_forward(self, action: Action) -> None:
        """Start sending the activations that one later stage reads."""
        m = action.microbatch
        message = self._route(m).sent.get(action.peer)
        if message is None or message.flow is None:
            return
        handle = self.step.transport.send(message.flow, self._outgoing.pop((m, action.peer)), message.spec)
        if not handle.done():
            self._sending.setdefault(m, []).append((action.peer, handle))
            self._join_oldest()

    # -- backward -----------------------------------------------------------------------------------------------------

    def backward(self, action: Action) -> None:
        """Run the backward of a micro-batch; parameters accumulate their gradients."""
        roots, gradients, inputs = self._due_backward(action.microbatch)
        with self.step.clock.span(action):
            if roots:
                torch.autograd.backward(roots, gradients)
        self._keep_gradients(action.microbatch, inputs)

    def input_gradients(self, action: Action) -> None:
        """Run the part of the backward of a micro-batch that earlier stages wait for."""
        m = action.microbatch
        roots, gradients, inputs = self._due_backward(m)
        division = self.step.programs[m].divisions[self.stage]
        with self.step.clock.span(action):
            self._weights[m] = input_gradients(roots, gradients, [v for _, v in inputs], division)
        self._keep_gradients(m, inputs)

    def weight_gradients(self, action: Action) -> None:
        """Run what is left of the backward of a micro-batch."""
        self.step.seed_for(action.microbatch)
        with self.step.clock.span(action):
            self._weights.pop(action.microbatch).run()

    def _due_backward(self, m: int) -> tuple[list[Tensor], list[Tensor], list[tuple[str, Tensor]]]:
        """The tensors to differentiate, the gradients that arrived for them, and the inputs that get gradients."""
        assert self.step.loss is not None
        self.step.loss.open()
        saved, spec = self._saved.pop(m), self.step.programs[m].specs[self.stage]
        roots: list[Tensor] = []
        gradients: list[Tensor] = []
        if saved.loss is not None:
            roots.append(saved.loss)
            gradients.append(self._loss_gradient(saved.loss, self.step.weights[m] * self.step.loss_scale))
        sums, answered = self._join_gradients(m)
        for output, value in zip(spec.outputs, saved.outputs, strict=True):
            if output.name in sums and value.requires_grad:
                roots.append(value)
                gradients.append(sums[output.name])
        for target, handle in self._sending.get(m, ()):
            if target in answered:
                handle.join()  # its gradient came back, so the activation was consumed: this cannot block
        self.step.seed_for(m)
        inputs = [(i.name, v) for i, v in zip(spec.inputs, saved.inputs, strict=True) if i.gradient]
        return roots, gradients, inputs

    def _loss_gradient(self, loss: Tensor, value: float) -> Tensor:
        """The gradient of a loss, a constant; most micro-batches share one tensor."""
        key = value, loss.shape, loss.dtype
        if key not in self._loss_gradients:
            self._loss_gradients[key] = loss.new_full(loss.shape, value)
        return self._loss_gradients[key]

    def _join_gradients(self, m: int) -> tuple[dict[str, Tensor], set[int]]:
        """The gradient of each output, summed over the stages that read it, in order; and the stages that sent any."""
        sums, answered = dict[str, Tensor](), set[int]()
        for target, message in self._route(m).gradients_received.items():
            gradients = self._arrived("RECV_B", m, target, message)
            if gradients is None:
                continue
            answered.add(target)
            for name, gradient in zip(message.names, gradients, strict=True):
                sums[name] = sums[name] + gradient if name in sums else gradient
        return sums, answered

    def _keep_gradients(self, m: int, inputs: Sequence[tuple[str, Tensor]]) -> None:
        left = {name: _gradient_of(value) for name, value in inputs}
        for source, message in self._route(m).gradients_sent.items():
            if message.flow is None:
                self.step.local["RECV_B", self.stage, source, m] = [left.pop(n) for n in message.names]
        if left:
            self._input_gradients[m] = left

    def send_backward(self, action: Action) -> None:
        """Start sending the gradients of the activations of one earlier stage."""
        m = action.microbatch
        message = self._route(m).gradients_sent.get(action.peer)
        if message is None or message.flow is None:
            return
        gradients = self._input_gradients[m]
        tensors = [gradients.pop(n) for n in message.names]
        if not gradients:
            del self._input_gradients[m]
        handle = self.step.transport.send(message.flow, tensors, message.spec)
        if not handle.done():
            self._gradients.append(handle)
            self._join_oldest()

    # -- buffers ------------------------------------------------------------------------------------------------------

    def _drop_finished(self) -> None:
        """Forget sends that have arrived, so that buffers grow with the stages and not with the micro-batches."""
        if self._gradients:
            self._gradients = [h for h in self._gradients if not h.done()]
        for m, sends in list(self._sending.items()):
            self._sending[m] = [(target, h) for target, h in sends if not h.done()]
            if not self._sending[m]:
                del self._sending[m]

    def _join_oldest(self) -> None:
        """Wait for the oldest of too many sends: gloo only tells that a send is over if one waits for it.

        The schedule was proved to be free of deadlock also if every send blocks until it is received.
        """
        while len(self._gradients) > MAX_POSTED_RECEIVES:
            self._gradients.pop(0).join()
        while len(self._sending) > self.step.mesh.num_stages + MAX_POSTED_RECEIVES:
            for _, handle in self._sending.pop(next(iter(self._sending))):
                handle.join()

    def finish(self) -> None:
        """Join all messages that are still on their way."""
        for handle in [*self._gradients, *(h for sends in self._sending.values() for _, h in sends)]:
            handle.join()
        self._gradients.clear()
        self._sending.clear()


def _gradient_of(value: Any) -> Tensor:
    gradient = value.grad
    value.grad = None
    return torch.zeros_like(value) if gradient is None else gradient
