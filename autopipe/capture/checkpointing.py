"""Checkpoint regions, of the model and of the plan: their nodes become one call that is computed again in the backward.

The model's regions behave as in the model. In a region of the plan (`RECOMPUTE`) a second run has no effect beside its
value: buffers that it writes, such as the statistics of a batch norm, are written once, and it starts from what they
held before.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from autopipe.capture.regions import emit_regions
from profiler.graph import is_region


class CheckpointRegion(nn.Module):
    """Runs a piece of a graph under `torch.utils.checkpoint` (non-reentrant, random state preserved)."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self._body = (body,)  # in a tuple: the piece's parameters are the stage's own, under the model's names

    @property
    def body(self) -> fx.GraphModule:
        """The part that is computed again."""
        return self._body[0]

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.body, *args, use_reentrant=False)


@dataclass(frozen=True, slots=True)
class Recompute:
    """A region of the plan: `node.meta["checkpoint"]` of its nodes, in the place of a region of the model."""

    number: int


class RecomputeRegion(CheckpointRegion):
    """A region of the plan; `buffers` are the modules and names of the buffers that it writes."""

    def __init__(self, body: fx.GraphModule, buffers: list[tuple[nn.Module, str]]) -> None:
        super().__init__(body)
        self._buffers_written = buffers

    def forward(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._body[0](*args)
        if not self._buffers_written:
            return super().forward(*args)
        before = [getattr(owner, name).clone() for owner, name in self._buffers_written]
        contexts = partial(_contexts, self._buffers_written, before)
        return checkpoint(self._body[0], *args, use_reentrant=False, context_fn=contexts)


def _contexts(buffers: list[tuple[nn.Module, str]], before: list[Tensor]) -> tuple[Any, Any]:
    return nullcontext(), _set_aside(buffers, before)


@contextmanager
def _set_aside(buffers: list[tuple[nn.Module, str]], values: list[Tensor]) -> Iterator[None]:
    """The modules hold these values instead of their buffers."""
    kept = [getattr(owner, name) for owner, name in buffers]
    for (owner, name), value in zip(buffers, values, strict=True):
        owner._buffers[name] = value.clone()
    try:
        yield
    finally:
        for (owner, name), value in zip(buffers, kept, strict=True):
            owner._buffers[name] = value


def wrap_checkpoints(graph: fx.Graph, root: dict[str, Any]) -> dict[str, Any]:
    """Replaces each run of nodes that share a `meta["checkpoint"]` by one call; returns the modules that these calls
    name.

    In a region of the model what writes in place is computed again too, as it is by the model: a batch norm there
    updates its statistics twice in a training step.
    """
    added: dict[str, Any] = {}
    compute = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    for number, (region, run) in enumerate(groupby(compute, key=lambda n: n.meta.get("checkpoint"))):
        nodes = list(run)
        if region is None:
            continue
        name = f"_autopipe_checkpoint_{number}"
        added[name] = _extract(graph, nodes, root, name)
    return added


def with_checkpoints(module: fx.GraphModule) -> fx.GraphModule:
    """The same module with its checkpoint regions as such, as stages have them; itself where it has none."""
    if not any("checkpoint" in n.meta for n in module.graph.nodes):
        return module
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: copies[n]))
        elif not is_region(node):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    root = {n.target: operator.attrgetter(n.target)(module) for n in graph.nodes if n.op in ("get_attr", "call_module")}
    root |= wrap_checkpoints(graph, root)
    emit_regions(graph)
    return fx.GraphModule(root, graph, type(module).__name__)


def _extract(graph: fx.Graph, nodes: list[fx.Node], root: dict[str, Any], name: str) -> CheckpointRegion:
    """Moves the nodes into a body of their own and puts a call of it in their place."""
    inside, body, copies = set(nodes), fx.Graph(), dict[fx.Node, fx.Node]()
    outside = list(dict.fromkeys(v for n in nodes for v in n.all_input_nodes if v not in inside))
    for value in outside:
        copies[value] = body.node_copy(value) if value.op == "get_attr" else body.placeholder(value.name)
    for node in nodes:
        copies[node] = body.node_copy(node, lambda v: copies[v])
    returned = [n for n in nodes if any(u not in inside for u in n.users)]
    written = [n.target for n in nodes if n.op == "call_module" and n.meta.get("writes")]
    written += [v.target for n in nodes if n.meta.get("writes") for v in n.all_input_nodes if v.op == "get_attr"]
    planned = isinstance(nodes[0].meta["checkpoint"], Recompute)
    body.output(tuple(copies[n] for n in returned))
    parts = {n.target: root[n.target] for n in body.nodes if n.op in ("get_attr", "call_module")}
    emit_regions(body)
    with graph.inserting_after(nodes[-1]):
        call = graph.call_module(name, tuple(v for v in outside if v.op != "get_attr"))
    position = call
    for i, node in enumerate(returned):
        with graph.inserting_after(position):
            item = position = graph.call_function(_take, (call, i))
        item.meta = {k: v for k, v in node.meta.items() if k != "checkpoint"}
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside and user is not call)
    for node in reversed(nodes):
        graph.erase_node(node)
    module = fx.GraphModule(parts, body)
    return RecomputeRegion(module, _buffers_of(module, written)) if planned else CheckpointRegion(module)


def _buffers_of(module: nn.Module, targets: Iterable[Any]) -> list[tuple[nn.Module, str]]:
    """The buffers at or under these dotted names, each once: the module that holds it, and its name there."""
    found: dict[tuple[nn.Module, str], None] = {}
    for target in map(str, targets):
        prefix, _, name = target.rpartition(".")
        owner = module.get_submodule(prefix)
        if name in owner._buffers:
            found[owner, name] = None
        elif name in owner._modules:
            for part in owner.get_submodule(name).modules():
                found |= dict.fromkeys((part, key) for key, value in part._buffers.items() if value is not None)
    return list(found)


def _take(values: tuple[Any, ...], index: int) -> Any:
    return values[index]
