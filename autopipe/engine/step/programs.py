"""Programs: for a kind of call and a signature, the captured graph, its cut, and this rank's stage modules."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from autopipe.capture import Captured, capture
from autopipe.capture.loss import LossFunction, no_loss
from autopipe.capture.seeding import RandomSource
from autopipe.engine.ranks.mesh import ProcessMesh
from autopipe.engine.step.microbatch import MicroBatch
from autopipe.engine.step.split_backward import Division, division_of
from autopipe.engine.transport.p2p import Flow, MessageSpec, TensorSpec
from autopipe.errors import CaptureError
from autopipe.schedule import Edge
from autopipe.stages import (
    MODEL_INPUT,
    Regions,
    StageInput,
    StageModule,
    StageSpec,
    cut,
    edges_of,
    stage_module,
    with_recompute,
)

Kind = Literal["train", "eval", "predict"]


@dataclass(frozen=True, slots=True)
class Message:
    """Tensors that go from one stage to another together.

    Attributes:
        names: of their nodes.
        spec: what they look like.
        flow: the ranks that they go between; None from one stage of this rank to another.
        places: of activations that leave, their places among the stage's outputs.
    """

    names: tuple[str, ...]
    spec: MessageSpec
    flow: Flow | None
    places: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The messages of one stage, by the stage at the other end: activations and gradients, received and sent.

    `reads_batch`: it also takes tensors of the caller's micro-batch.
    """

    received: Mapping[int, Message]
    sent: Mapping[int, Message]
    gradients_received: Mapping[int, Message]
    gradients_sent: Mapping[int, Message]
    reads_batch: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A captured graph cut into stages, and the modules of this rank.

    Attributes:
        captured: gives inputs their order and outputs their structure.
        specs: what each stage reads and gives.
        modules: the stages of this rank.
        divisions: how far the backward of each of them can be divided, for schedules that do.
        loss_stage: the stage that holds the loss, None where there is none.
        edges: the stage graph.
        routes: what each of this rank's stages says to which other.
    """

    captured: Captured
    specs: tuple[StageSpec, ...]
    modules: Mapping[int, StageModule]
    divisions: Mapping[int, Division]
    loss_stage: int | None
    edges: tuple[Edge, ...]
    routes: Mapping[int, Route]


def capture_program(
    model: nn.Module,
    microbatch: MicroBatch,
    kind: Kind,
    loss_fn: LossFunction | None,
    *,
    check: bool,
    modes: Callable[[], Any],
) -> Captured:
    """Capture the model for one kind of call.

    Args:
        modes: gives the context under which the stages will run (autocast).

    Raises:
        CaptureError: the model cannot be captured, or gives no loss where one is needed.
    """
    loss = None if kind == "predict" else loss_fn
    grad = contextlib.nullcontext() if kind == "train" else torch.no_grad()
    with modes(), grad, _without_gradients(model):
        captured = capture(
            model, microbatch.args, microbatch.kwargs, loss_fn=loss, target=microbatch.target, check=check
        )
    if kind == "predict":
        return dataclasses.replace(captured, loss=None)  # a loss that the model gives is an output like the others
    if captured.loss is None:
        values = [n.meta["val"] for n in captured.graph_module.graph.output_node().args[0]]  # type: ignore[union-attr]
        raise no_loss(captured.unflatten(values))
    captured = captured.loss_only()
    loss_node: Any = captured.graph_module.graph.output_node().args[0]
    if kind == "train" and not loss_node[0].meta["val"].requires_grad:
        raise CaptureError(
            "a loss that depends on no trainable parameter",
            expected="a differentiable loss",
            where=str(loss_node[0].meta.get("source", "")),
            remedy="set requires_grad on the parameters that are to be trained, and do not detach the loss",
        )
    return captured


def capture_output(model: nn.Module, microbatch: MicroBatch, *, check: bool, modes: Callable[[], Any]) -> Captured:
    """Capture what is planned if there is no target: up to the loss that the model returns, or up to its output."""
    with modes(), _without_gradients(model):
        captured = capture(model, microbatch.args, microbatch.kwargs, check=check)
    return captured if captured.loss is None else captured.loss_only()


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Take gradients away for a while: they may have another dtype than their parameters' fake copies."""
    before = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def make_program(
    kind: Kind,
    captured: Captured,
    stage_of: Mapping[str, int],
    mesh: ProcessMesh,
    random: RandomSource,
    *,
    compiled: bool,
    recompute: Regions = (),
) -> Program:
    """Cut a captured graph and build this rank's modules; the regions `recompute` are computed again in the backward.

    Args:
        kind: kind of the calls that run it; the messages of a training step recur in the next.
    """
    specs = tuple(with_recompute(spec, recompute) for spec in cut(captured, stage_of, mesh.num_stages))
    loss_stage = None
    if captured.loss is not None:
        results: Any = captured.graph_module.graph.output_node().args[0]
        loss_stage = stage_of[results[captured.loss].name]
    modules = {s: stage_module(captured, specs[s], random) for s in mesh.stages}
    divisions = {s: division_of(module) for s, module in modules.items()}
    if compiled:
        for module in modules.values():
            module.compile()
    return Program(
        captured=captured,
        specs=specs,
        modules=modules,
        divisions=divisions,
        loss_stage=loss_stage,
        edges=edges_of(specs),
        routes={s: _route(specs, s, mesh, repeated=kind == "train") for s in mesh.stages},
    )


def _route(specs: tuple[StageSpec, ...], stage: int, mesh: ProcessMesh, *, repeated: bool) -> Route:
    message = partial(_message, repeated=repeated)
    spec = specs[stage]
    sources = sorted({i.source for i in spec.inputs} - {MODEL_INPUT})
    targets = sorted({t for o in spec.outputs for t in o.targets})
    received = {s: spec.received_from(s) for s in sources}
    sent = {t: specs[t].received_from(stage) for t in targets}
    come = {s: mesh.flow(s, stage) for s in sources + targets}
    go = {t: mesh.flow(stage, t) for t in sources + targets}
    return Route(
        received={s: message(inputs, come[s]) for s, inputs in received.items()},
        sent={t: message(inputs, go[t], tuple(spec.sent_to(t))) for t, inputs in sent.items()},
        gradients_received={t: message(inputs, come[t]) for t, inputs in _with_gradient(sent).items()},
        gradients_sent={s: message(inputs, go[s]) for s, inputs in _with_gradient(received).items()},
        reads_batch=any(i.source == MODEL_INPUT for i in spec.inputs),
    )


def _with_gradient(inputs: Mapping[int, list[StageInput]]) -> dict[int, list[StageInput]]:
    """The inputs whose gradients come back, in the order of their activations."""
    differentiable = {peer: [i for i in tensors if i.gradient] for peer, tensors in inputs.items()}
    return {peer: tensors for peer, tensors in differentiable.items() if tensors}


def _message(inputs: list[StageInput], flow: Flow | None, places: tuple[int, ...] = (), *, repeated: bool) -> Message:
    tensors = [TensorSpec(shape=i.shape, dtype=i.dtype, stride=i.stride) for i in inputs]
    return Message(tuple(i.name for i in inputs), MessageSpec(tensors, repeated), flow, places)


@contextlib.contextmanager
def mode_of(model: nn.Module, training: bool, flags: Mapping[nn.Module, bool]) -> Iterator[None]:
    """The model in training mode, as its modules' own flags say, or in evaluation mode; put back afterwards."""
    before = {m: m.training for m in model.modules()}
    set_mode(model, training, flags)
    try:
        yield
    finally:
        for module, value in before.items():
            module.training = value


def set_mode(module: nn.Module, training: bool, flags: Mapping[nn.Module, bool]) -> None:
    """Set training mode as the user's flags say (a frozen batch norm stays in evaluation), or evaluation for all."""
    for part in module.modules():
        wanted = training and flags.get(part, True)
        if part.training is not wanted:  # setting an attribute of a module costs more than reading it
            part.training = wanted
