"""Checkpoint regions of the model stay checkpoint regions in the graph: their nodes become one call that is computed again in the backward."""

from __future__ import annotations

import operator
from itertools import groupby
from typing import Any

from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from autopipe.capture.regions import emit_regions, is_region_node


class CheckpointRegion(nn.Module):
    """Runs a piece of a graph under `torch.utils.checkpoint` (non-reentrant, random state preserved)."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self._body = (body,)  # in a tuple: the piece's parameters are the stage's own, under the model's names

    @property
    def body(self) -> fx.GraphModule:
        """What is computed again."""
        return self._body[0]

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.body, *args, use_reentrant=False)


def wrap_checkpoints(graph: fx.Graph, root: dict[str, Any]) -> dict[str, Any]:
    """Replaces each run of nodes that share a `meta["checkpoint"]` by one call; returns the modules that these calls name.

    What writes in place is computed again too, as it is by the model: a batch norm in a checkpoint region updates its
    statistics twice in a training step.
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
        elif not is_region_node(node):
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
    return CheckpointRegion(fx.GraphModule(parts, body))


def _take(values: tuple[Any, ...], index: int) -> Any:
    return values[index]
