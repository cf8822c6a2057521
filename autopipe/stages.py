"""Cut a captured graph into stages by a placement of its nodes: what each reads and sends, and a module for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from autopipe.capture.captured import Captured
from autopipe.capture.checkpointing import Recompute, wrap_checkpoints
from autopipe.capture.compat import is_scripted
from autopipe.capture.effects import tensors_in
from autopipe.capture.loss import LOSS_MODULE
from autopipe.capture.regions import emit_regions
from autopipe.capture.seeding import SOURCE, RandomSource, add_seeds
from autopipe.errors import PlanError
from autopipe.plan import Plan
from autopipe.schedule import Edge

MODEL_INPUT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInput:
    """A tensor that a stage reads and does not make.

    Attributes:
        name: the node that makes it.
        source: the stage that sends it, or MODEL_INPUT: it is among the tensors of the caller's micro-batch.
        position: of a model input, its position among these tensors.
        shape, dtype, stride: of one micro-batch.
        gradient: its gradient is sent back.
    """

    name: str
    source: int
    position: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    gradient: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutput:
    """A tensor that a stage makes for others: the stages that read it, and whether gradients come back from them."""

    name: str
    targets: tuple[int, ...]
    gradient: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """Inputs, nodes and outputs of a stage.

    Attributes:
        index: the stage.
        nodes: the names of its nodes, in order.
        inputs: in the order of the module's arguments; those of one source are in the order in which they are received.
        outputs: in the order in which they are sent; the first values that the module returns.
        results: positions of the graph's outputs that this stage makes or holds; the values that follow.
        recompute: regions of its nodes that are computed again in the backward.
    """

    index: int
    nodes: tuple[str, ...]
    inputs: tuple[StageInput, ...]
    outputs: tuple[StageOutput, ...]
    results: tuple[int, ...]
    recompute: tuple[tuple[str, ...], ...] = ()

    def received_from(self, source: int) -> list[StageInput]:
        """The tensors that come from one stage, in order."""
        return [i for i in self.inputs if i.source == source]

    def sent_to(self, target: int) -> list[int]:
        """Positions of the outputs that go to one stage, in order."""
        return [i for i, out in enumerate(self.outputs) if target in out.targets]


class StageModule(fx.GraphModule):
    """One stage: takes the tensors of `spec.inputs`, returns the tuple of outputs and results of `spec`.

    Its submodules, parameters and their names are the model's own; `state_dict()` has the model's keys.
    """

    spec: StageSpec

    def __init__(self, root: Any, graph: fx.Graph, class_name: str, spec: StageSpec) -> None:
        super().__init__(root, graph, class_name)
        self.spec = spec


def build_stage(captured: Captured, plan: Plan, index: int) -> StageModule:
    """The module of stage `index` of a plan.

    Raises:
        PlanError: the plan was made for another graph, or has no such stage.
    """
    if not 0 <= index < plan.num_stages:
        raise PlanError(f"stage {index}", expected=f"0 to {plan.num_stages - 1}", remedy="ask for a stage of the plan")
    spec = cut(captured, placement(captured, plan), plan.num_stages)[index]
    return stage_module(captured, with_recompute(spec, regions_of(plan)))


def placement(captured: Captured, plan: Plan) -> dict[str, int]:
    """The stage of every node by the plan.

    Raises:
        PlanError: the plan does not name the nodes of this graph.
    """
    stage_of = dict(plan.stage_of)
    nodes = captured.nodes
    names = {n.name for n in nodes}
    for node in nodes:
        if node.target == LOSS_MODULE:  # a plan made without the loss function has no node for it
            stage_of.setdefault(node.name, plan.num_stages - 1)
    strangers = sorted(names ^ stage_of.keys())
    if strangers:
        raise PlanError(
            f"a plan for graph {plan.graph_hash or '(unnamed)'} of {len(plan.stage_of)} nodes; "
            f"{strangers[0]!r} is a node of only {'the model' if strangers[0] in names else 'the plan'}",
            expected=f"a plan for this model, graph {captured.graph_hash} of {len(nodes)} nodes",
            remedy="plan this model with `autopipe plan`, with the same loss and the same example shapes",
        )
    return stage_of


def cut(captured: Captured, stage_of: Mapping[str, int], num_stages: int) -> tuple[StageSpec, ...]:
    """Return inputs and outputs of every stage under a placement; the graph's results are gathered on the last stage.

    Raises:
        PlanError: a node stands on an earlier stage than one that it reads.
    """
    graph = captured.graph_module.graph
    placeholders = {n: i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    results: list[fx.Node] = list(_output_nodes(graph))
    last = num_stages - 1
    readers: dict[fx.Node, set[int]] = {}
    for node in captured.nodes:
        for value in node.all_input_nodes:
            if value.op != "get_attr":
                readers.setdefault(value, set()).add(stage_of[node.name])
                if value not in placeholders and stage_of[value.name] > stage_of[node.name]:
                    raise PlanError(
                        f"node {node.name!r} on stage {stage_of[node.name]} reads {value.name!r} on stage "
                        f"{stage_of[value.name]}",
                        expected="every node on the stage of its inputs or a later one",
                        where=str(node.meta.get("source", "")),
                        remedy="plan the model again",
                    )
    loss = None if captured.loss is None else results[captured.loss]
    gradient = _gets_gradient(captured.nodes, results if loss is None else [loss])
    for value in results:
        if value is not loss and value.op != "get_attr":
            readers.setdefault(value, set()).add(last)
    specs = []
    for stage in range(num_stages):
        nodes = [n for n in captured.nodes if stage_of[n.name] == stage]
        inputs = [
            _stage_input(v, placeholders, stage_of, v in gradient)
            for v in graph.nodes
            if v.op != "get_attr" and stage in readers.get(v, ()) and (v in placeholders or stage_of[v.name] != stage)
        ]
        outputs = [
            StageOutput(name=n.name, targets=tuple(sorted(readers.get(n, set()) - {stage})), gradient=n in gradient)
            for n in nodes
            if readers.get(n, set()) - {stage}
        ]
        held = [i for i, v in enumerate(results) if stage == (stage_of[v.name] if v is loss else last)]
        specs.append(
            StageSpec(
                index=stage,
                nodes=tuple(n.name for n in nodes),
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                results=tuple(held),
            )
        )
    return tuple(specs)


Regions = tuple[tuple[str, ...], ...]


def regions_of(plan: Plan) -> Regions:
    """All regions of a plan that are computed again in the backward."""
    return tuple(region for stage in plan.stages for region in stage.recompute)


def with_recompute(spec: StageSpec, regions: Regions) -> StageSpec:
    """The stage with what it has of these regions: the nodes of another graph may stand on other stages."""
    mine = set(spec.nodes)
    parts = (tuple(name for name in region if name in mine) for region in regions)
    return dataclasses.replace(spec, recompute=tuple(part for part in parts if part))


def edges_of(specs: tuple[StageSpec, ...]) -> tuple[Edge, ...]:
    """The stage graph: which stages send to which, and whether gradients come back."""
    backward: dict[tuple[int, int], bool] = {}
    for spec in specs:
        for value in spec.inputs:
            if value.source != MODEL_INPUT:
                pair = (value.source, spec.index)
                backward[pair] = backward.get(pair, False) or value.gradient
    return tuple(Edge(source, target, gradient) for (source, target), gradient in sorted(backward.items()))


def stage_module(captured: Captured, spec: StageSpec, random: RandomSource | None = None) -> StageModule:
    """The module that runs the nodes of one stage; with `random`, each node that draws random numbers is seeded by
    it."""
    source, graph = captured.graph_module, fx.Graph()
    nodes = {n.name: n for n in source.graph.nodes}
    copies: dict[fx.Node, fx.Node] = {}
    for value in spec.inputs:
        copies[nodes[value.name]] = graph.placeholder(value.name)
        copies[nodes[value.name]].meta = dict(nodes[value.name].meta)

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:
            assert node.op == "get_attr", f"{node.name} is no input of stage {spec.index}"
            copies[node] = graph.node_copy(node)
        return copies[node]

    for name in spec.nodes:
        for value in nodes[name].all_input_nodes:
            copy_of(value)
        copies[nodes[name]] = graph.node_copy(nodes[name], copy_of)
    for number, region in enumerate(spec.recompute):
        for name in region:
            copies[nodes[name]].meta.setdefault("checkpoint", Recompute(number))
    results = _output_nodes(source.graph)
    returned = [copies[nodes[o.name]] for o in spec.outputs] + [copy_of(results[i]) for i in spec.results]
    graph.output(tuple(returned))
    seeded = random is not None and add_seeds(graph)
    root: dict[str, Any] = {
        n.target: random if seeded and n.target == SOURCE else _fetch(source, n.target)
        for n in graph.nodes
        if n.op in ("get_attr", "call_module")
    }
    root |= wrap_checkpoints(graph, root)
    emit_regions(graph)
    module = StageModule(root, graph, f"Stage{spec.index}", spec)
    for target, value in root.items():
        _attach(module, target, value)
    _keep_persistence(module, source)
    return module


def _output_nodes(graph: fx.Graph) -> list[fx.Node]:
    values: Any = graph.output_node().args[0]
    return list(values)


def _stage_input(
    value: fx.Node, placeholders: Mapping[fx.Node, int], stage_of: Mapping[str, int], gradient: bool
) -> StageInput:
    tensor: Tensor = value.meta["val"]
    outside = value in placeholders
    return StageInput(
        name=value.name,
        source=MODEL_INPUT if outside else stage_of[value.name],
        position=placeholders.get(value, -1),
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        stride=tuple(tensor.stride()),
        gradient=gradient and not outside,
    )


def _gets_gradient(nodes: list[fx.Node], roots: list[fx.Node]) -> set[fx.Node]:
    """The nodes whose value gets a gradient when the roots are differentiated.

    A value that is written into another tensor counts too: the gradient reaches it through the written tensor.
    """
    wanted = {r for r in roots if _differentiable(r)}
    for node in reversed(nodes):
        if node in wanted or node.meta.get("writes"):
            wanted |= {v for v in node.all_input_nodes if _differentiable(v)}
    return wanted


def _differentiable(node: fx.Node) -> bool:
    return any(t.requires_grad for t in tensors_in(node.meta.get("val")))


def _fetch(module: nn.Module, target: Any) -> Any:
    value: Any = module
    for part in str(target).split("."):
        value = getattr(value, part)
    return value


def _attach(module: nn.Module, target: str, value: Any) -> None:
    """Make `value` an attribute of the module under a dotted name, where checkpoint regions alone refer to it."""
    parent, _, name = target.rpartition(".")
    for part in parent.split(".") if parent else []:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if hasattr(module, name):
        return
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


def _keep_persistence(module: nn.Module, source: nn.Module) -> None:
    """Keep the buffers outside the model's state dict outside of it."""
    for prefix, owner in module.named_modules():
        for name in () if is_scripted(owner) else owner._buffers:
            twin = _fetch(source, prefix) if prefix else source
            if name in twin._non_persistent_buffers_set:
                owner._non_persistent_buffers_set.add(name)
