"""Reading a `torch.fx` graph: which nodes compute, what they read, and which submodule they came from."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import fx
from torch.amp import autocast_mode

REGION_TARGETS = (torch._C._set_grad_enabled, autocast_mode._enter_autocast, autocast_mode._exit_autocast)


def is_region(node: fx.Node) -> bool:
    """Whether the node only switches grad mode or autocast for the nodes after it."""
    return node.op == "call_function" and node.target in REGION_TARGETS


def is_compute(node: fx.Node) -> bool:
    """Whether the node is one of a profile: it computes, rather than names an input, a parameter, an output or a
    mode."""
    return node.op in ("call_module", "call_function", "call_method") and not is_region(node)


def compute_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a profile, in the order of the graph."""
    return [n for n in graph.nodes if is_compute(n)]


def compute_inputs(node: fx.Node) -> tuple[str, ...]:
    """Names of the compute nodes that a node reads, each once."""
    return tuple(n.name for n in node.all_input_nodes if is_compute(n))


def module_of(node: fx.Node) -> str:
    """FQN of the submodule that a node came from; empty for the model itself or where it is not known."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        return str(next(reversed(stack)))
    return str(node.target) if node.op == "call_module" else ""


def recomputed_nodes(graph: fx.Graph) -> dict[fx.Node, int]:
    """Nodes that run under `torch.utils.checkpoint`, each with the number of its region.

    Capture notes the region as `node.meta["checkpoint"]`; a run of such nodes is computed again in the backward, unless
    one of them writes in place (`node.meta["writes"]`).
    """
    found: dict[fx.Node, int] = {}
    for number, (region, run) in enumerate(groupby(compute_nodes(graph), key=lambda n: n.meta.get("checkpoint"))):
        nodes = list(run)
        if region is not None and not any(n.meta.get("writes") for n in nodes):
            found |= dict.fromkeys(nodes, number)
    return found


def last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the nodes whose values nobody reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for node, reader in last.items():
        dying.setdefault(reader, []).append(node)
    return dying
