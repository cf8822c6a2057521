"""Build the stages of a plan for `torch.distributed.pipelining`.

There a stage reads from the stage before it alone. So a tensor that skips stages, or an input of the model that a later
stage reads, is passed on by every stage between: each stage takes the tensors of `inputs` and returns those of
`outputs`, as static shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from autopipe.capture.captured import Captured
from autopipe.errors import PlanError
from autopipe.plan import Plan
from autopipe.stages import MODEL_INPUT, StageInput, StageModule, StageSpec, cut, placement, stage_module


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """A parameter that several stages hold, each a copy of its own."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class TorchStage(nn.Module):
    """One stage: takes the tensors of `inputs`, returns those of `outputs`; the last returns the model's outputs or its
    loss.

    A scalar, which torch cannot put together over micro-batches, is returned with shape (1,).

    Attributes:
        index, num_stages: its place.
        module: the nodes of the stage, under the model's parameter names.
        inputs, outputs: the tensors that it takes and returns, by the names of the nodes that make them.
        shared: the parameters that several stages hold, the same list for every stage.
    """

    def __init__(
        self,
        module: StageModule,
        num_stages: int,
        inputs: Sequence[StageInput],
        outputs: Sequence[StageInput],
        results: Sequence[Tensor],
    ) -> None:
        super().__init__()
        self.module, self.index, self.num_stages = module, module.spec.index, num_stages
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.shared: tuple[Shared, ...] = ()
        self.copies: dict[str, nn.Parameter] = {}
        self._result_shapes = [(tuple(v.shape) or (1,), v.dtype, v.requires_grad) for v in results]

    @property
    def is_last(self) -> bool:
        """Return whether it returns the model's outputs."""
        return self.index == self.num_stages - 1

    def forward(self, *received: Tensor) -> Any:
        """Run the stage and pass on what later stages read."""
        spec = self.module.spec
        values = {tensor.name: value for tensor, value in zip(self.inputs, received, strict=True)}
        made = self.module(*(values[i.name] for i in spec.inputs))
        if self.is_last:
            results = tuple(v.reshape(1) if v.dim() == 0 else v for v in made[len(spec.outputs) :])
            return results[0] if len(results) == 1 else results
        own = {o.name: value for o, value in zip(spec.outputs, made, strict=False)}
        return tuple(own[w.name].contiguous() if w.name in own else _passed(values[w.name]) for w in self.outputs)

    def input_args(self) -> tuple[Tensor, ...]:
        """Tensors on the meta device with the shapes of what it takes, for `PipelineStage(input_args=...)`."""
        return tuple(_like(w.shape, w.dtype, w.gradient) for w in self.inputs)

    def output_args(self) -> tuple[Tensor, ...]:
        """Tensors on the meta device with the shapes of what it returns."""
        if self.is_last:
            return tuple(_like(*described) for described in self._result_shapes)
        return tuple(_like(w.shape, w.dtype, w.gradient) for w in self.outputs)


def torch_stages(captured: Captured, plan: Plan) -> tuple[TorchStage, ...]:
    """All stages of a plan. The parameters are the model's own; of a parameter that several stages read, each later one
    has a copy.

    Raises:
        PlanError: the plan is of another graph, or torch's schedules cannot express it.
    """
    specs = cut(captured, placement(captured, plan), plan.num_stages)
    results: Any = captured.graph_module.graph.output_node().args[0]
    _check_results(captured, specs, len(results))
    wires = [_model_inputs(captured), *(_wires(specs, stage) for stage in range(1, plan.num_stages)), []]
    _check_wires(wires, plan.num_stages)
    values = [node.meta["val"] for node in results]
    stages = tuple(
        TorchStage(stage_module(captured, spec), plan.num_stages, wires[i], wires[i + 1], values)
        for i, spec in enumerate(specs)
    )
    _separate(stages, captured)
    return stages


def pipeline_stage(stage: TorchStage, device: torch.device | str, group: Any = None) -> PipelineStage:
    """The public stage of torch, with static input and output arguments, so that nothing is inferred by running the
    model."""
    return PipelineStage(
        stage,
        stage.index,
        stage.num_stages,
        torch.device(device),
        input_args=stage.input_args(),
        output_args=stage.output_args(),
        group=group,
    )


def sum_tied_gradients(stages: Sequence[TorchStage], group: Any = None) -> None:
    """Sum the gradients of shared parameters over all stages; every rank calls it with its own stages, before the
    optimizer step."""
    for shared in stages[0].shared:
        copies = [stage.copies[shared.name] for stage in stages if shared.name in stage.copies]
        device = next(stages[0].parameters()).device
        total = torch.zeros(shared.shape, dtype=shared.dtype, device=device)
        for copy in copies:
            if copy.grad is not None:
                total += copy.grad
        dist.all_reduce(total, group=group)
        for copy in copies:
            copy.grad = total.clone()


def _like(shape: tuple[int, ...], dtype: torch.dtype, gradient: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=gradient)


def _passed(value: Tensor) -> Tensor:
    """A received tensor as an output: not the leaf itself, into which torch accumulates the gradient."""
    return value.view_as(value)


def _model_inputs(captured: Captured) -> list[StageInput]:
    """The inputs of the first stage: all tensors of the model's call, in order."""
    return [
        StageInput(
            name=node.name,
            source=MODEL_INPUT,
            position=i,
            shape=tuple(node.meta["val"].shape),
            dtype=node.meta["val"].dtype,
            stride=tuple(node.meta["val"].stride()),
            gradient=False,
        )
        for i, node in enumerate(n for n in captured.graph_module.graph.nodes if n.op == "placeholder")
    ]


def _wires(specs: Sequence[StageSpec], stage: int) -> list[StageInput]:
    """The tensors that enter a stage: all that it or a later one reads and an earlier one, or the caller, gives."""
    wires: dict[str, StageInput] = {}
    for spec in specs[stage:]:
        for value in spec.inputs:
            if value.source < stage:
                wires.setdefault(value.name, value)
    return list(wires.values())


def _separate(stages: Sequence[TorchStage], captured: Captured) -> None:
    """Give each stage but the first its own copy of a shared parameter: torch scales the gradients of every stage by
    itself."""
    holders: dict[nn.Parameter, list[TorchStage]] = {}
    for stage in stages:
        for parameter in stage.parameters():
            holders.setdefault(parameter, []).append(stage)
    names = {p: captured.names.get(n, n) for n, p in captured.graph_module.named_parameters(remove_duplicate=False)}
    shared = {p: stages_ for p, stages_ in holders.items() if len(stages_) > 1}
    records = tuple(Shared(name=names[p], shape=tuple(p.shape), dtype=p.dtype) for p in shared)
    for stage in stages:
        stage.shared = records
    for parameter, readers in shared.items():
        for i, stage in enumerate(readers):
            copy = (
                parameter if i == 0 else nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            )
            stage.copies[names[parameter]] = copy
            for module in stage.modules():
                for name, value in module._parameters.items():
                    if value is parameter:
                        module._parameters[name] = copy


def _check_results(captured: Captured, specs: Sequence[StageSpec], num_results: int) -> None:
    if len(specs[-1].results) != num_results:
        raise PlanError(
            "an output of the model that is made before the last stage and not passed to it",
            expected="all outputs on the last stage, from which torch's schedules take them",
            where="export",
            remedy="plan with the loss on the last stage: let the model compute it at its end",
        )


def _check_wires(wires: Sequence[Sequence[StageInput]], num_stages: int) -> None:
    for stage in range(1, num_stages):
        if not wires[stage]:
            raise PlanError(
                f"stage {stage} that reads nothing of an earlier one",
                expected="a tensor from the stage before",
                where="export",
                remedy="use fewer stages",
            )
        plain = [w.name for w in wires[stage] if not w.gradient]
        if plain and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
            raise PlanError(
                f"{plain[0]!r} crosses to stage {stage} without a gradient",
                expected="torch 2.13, whose PipelineStage takes such tensors",
                where="export",
                remedy="install torch 2.13 or newer, or run the plan with autopipe",
            )
