"""What the ranks run for a kind of call and a signature: the captured graph, its cut, and this rank's stage module."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from autopipe.capture import Captured, capture
from autopipe.capture.loss import LossFunction, no_loss
from autopipe.capture.seeding import RandomSource
from autopipe.engine.batch import MicroBatch
from autopipe.engine.layout import Layout
from autopipe.engine.split_backward import Division, division_of
from autopipe.engine.transport import TensorSpec
from autopipe.errors import CaptureError
from autopipe.schedule import Edge
from autopipe.stages import Regions, StageModule, StageSpec, cut, edges_of, stage_module, with_recompute

Kind = Literal["train", "eval", "predict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A captured graph cut into stages, and the modules of this rank.

    Attributes:
        captured: gives inputs their order and outputs their structure.
        specs: what each stage reads and gives.
        modules: the stages of this rank.
        divisions: how far the backward of each of them can be divided, for schedules that do.
        loss_stage: the stage that holds the loss, None where there is none.
    """

    captured: Captured
    specs: tuple[StageSpec, ...]
    modules: Mapping[int, StageModule]
    divisions: Mapping[int, Division]
    loss_stage: int | None

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The stage graph."""
        return edges_of(self.specs)

    def forward_message(self, source: int, target: int) -> list[TensorSpec]:
        """The activations that go from one stage to another, in order."""
        return [
            TensorSpec(shape=i.shape, dtype=i.dtype, stride=i.stride) for i in self.specs[target].received_from(source)
        ]

    def backward_message(self, source: int, target: int) -> list[TensorSpec]:
        """The gradients that come back over the edge, in the order of their activations."""
        return [
            TensorSpec(shape=i.shape, dtype=i.dtype, stride=i.stride)
            for i in self.specs[target].received_from(source)
            if i.gradient
        ]


def capture_program(
    model: nn.Module,
    microbatch: MicroBatch,
    kind: Kind,
    loss_fn: LossFunction | None,
    *,
    check: bool,
    modes: Callable[[], Any],
) -> Captured:
    """Captures the model for one kind of call.

    Args:
        modes: gives the context under which the stages will run (autocast).

    Raises:
        CaptureError: the model cannot be captured, or gives no loss where one is needed.
    """
    loss = None if kind == "predict" else loss_fn
    with modes(), contextlib.nullcontext() if kind == "train" else torch.no_grad():
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


def make_program(
    captured: Captured,
    stage_of: Mapping[str, int],
    layout: Layout,
    random: RandomSource,
    *,
    compiled: bool,
    recompute: Regions = (),
) -> Program:
    """Cuts a captured graph and builds this rank's modules, with what the regions `recompute` name of it computed again."""
    specs = tuple(with_recompute(spec, recompute) for spec in cut(captured, stage_of, layout.num_stages))
    loss_stage = None
    if captured.loss is not None:
        results: Any = captured.graph_module.graph.output_node().args[0]
        loss_stage = stage_of[results[captured.loss].name]
    modules = {s: stage_module(captured, specs[s], random) for s in layout.stages}
    divisions = {s: division_of(module) for s, module in modules.items()}
    if compiled:
        for module in modules.values():
            module.compile()
    return Program(captured=captured, specs=specs, modules=modules, divisions=divisions, loss_stage=loss_stage)


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
    """Training mode is what the user's flags say (a frozen batch norm stays in evaluation); evaluation mode is off for all."""
    for part in module.modules():
        part.training = training and flags.get(part, True)
