"""A stage's backward in two parts: first the gradients that the stage before waits for, later those of the parameters.

The autograd graph of a stage is walked from its outputs. A node lies on the *path* when an input of the stage is reached from it.
Where a node of the path also leads off it, to parameters, it is a *junction*:

    output ── gelu ── addmm ── layer_norm ── input        the path
                        │          │
                     weight, bias  weight, bias           beside it

The first part runs the path alone and catches the gradient that arrives at each junction; autograd computes only what is asked for,
so that an `addmm` there multiplies once and not twice. The second part starts at each junction and computes what lies beside the
path. The idea is that of zero-bubble schedules (Qi et al. 2023, https://arxiv.org/abs/2401.10241).

Some parameters get their gradients in the first part, since the second would count or compute something twice: those reached
from several junctions (a weight that a stage uses twice), those of normalisations (their backward gives all gradients in one pass),
those read by a Python `autograd.Function` that lies on the path (its backward would be called twice), and those in a checkpoint
region (it would be computed again once more).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from autopipe.capture.checkpointing import CheckpointRegion
from autopipe.stages import StageModule

_ROOTS, _FIRST_PART = "roots", "first part"


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How far the backward of a stage can be divided.

    Attributes:
        whole: not at all: a backward hook would be called in both parts.
        with_inputs: parameters whose gradients belong to the first part.
    """

    whole: bool = False
    with_inputs: frozenset[nn.Parameter] = frozenset()


def division_of(module: StageModule) -> Division:
    """Reads a stage for backward hooks and checkpoint regions."""
    regions = [m for m in module.modules() if isinstance(m, CheckpointRegion)]
    bodies = [module, *(region.body for region in regions)]
    parts = [m for body in bodies for m in body.modules()]
    hooks = any(m._backward_hooks or m._backward_pre_hooks for m in parts)
    hooks = hooks or any(n.op == "call_method" and n.target == "register_hook" for b in bodies for n in b.graph.nodes)
    return Division(whole=hooks, with_inputs=frozenset(p for region in regions for p in region.body.parameters()))


@dataclass(slots=True)
class _Group:
    """Parameters that one junction, or the roots alone, lead to; `edges` and `gradients` are where their part begins."""

    parameters: list[Tensor] = field(default_factory=list)
    edges: list[Any] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)


class WeightGradients:
    """The second part, to be run once. It keeps the stage's activations alive until then."""

    def __init__(self, groups: Iterable[_Group]) -> None:
        self._groups = list(groups)

    def run(self) -> None:
        """Adds the gradients to the parameters' `.grad`."""
        for group in self._groups:
            torch.autograd.backward(group.edges, group.gradients, inputs=group.parameters or None)
        self._groups.clear()


def input_gradients(
    roots: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor], division: Division
) -> WeightGradients:
    """The first part: adds the gradients of `inputs` to their `.grad`, and gives what is left to do.

    Args:
        roots, gradients: as for `torch.autograd.backward`.
        inputs: leaves that require a gradient.
    """
    if not roots:
        return WeightGradients(())
    if division.whole:
        torch.autograd.backward(roots, gradients)
        return WeightGradients(())
    root_nodes = [get_gradient_edge(r).node for r in roots]
    parents = _parents(root_nodes)
    path = _above([get_gradient_edge(i).node for i in inputs], parents)
    if not path:
        return WeightGradients([_Group(edges=list(roots), gradients=list(gradients))])
    owners = _owners(root_nodes, parents, path)
    groups: dict[Any, _Group] = {}
    first: list[Tensor] = list(inputs)
    for node, owner in owners.items():
        if type(node).__name__ == "AccumulateGrad":
            if owner is _FIRST_PART or node.variable in division.with_inputs:
                first.append(node.variable)
            else:
                groups.setdefault(owner, _Group()).parameters.append(node.variable)
    caught: dict[Any, Sequence[Tensor | None]] = {}
    hooks = [node.register_prehook(partial(_catch, caught, node)) for node in groups if node is not _ROOTS]
    torch.autograd.backward(roots, gradients, retain_graph=bool(groups), inputs=first)
    for hook in hooks:
        hook.remove()
    for node, group in groups.items():
        if node is _ROOTS:
            beside = [i for i, n in enumerate(root_nodes) if n not in path]
            group.edges, group.gradients = [roots[i] for i in beside], [gradients[i] for i in beside]
        else:
            arrived = [(i, g) for i, g in enumerate(caught.get(node, ())) if g is not None]
            group.edges, group.gradients = [GradientEdge(node, i) for i, _ in arrived], [g for _, g in arrived]
    return WeightGradients(g for g in groups.values() if g.edges)


def _catch(caught: dict[Any, Sequence[Tensor | None]], node: Any, gradients: Sequence[Tensor | None]) -> None:
    caught[node] = gradients


def _parents(roots: Sequence[Any]) -> dict[Any, list[Any]]:
    """For each node of the graph below the roots, the nodes that lead to it."""
    parents: dict[Any, list[Any]] = {node: [] for node in roots}
    stack = list(parents)
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            if child in parents:
                parents[child].append(node)
            elif child is not None:
                parents[child] = [node]
                stack.append(child)
    return parents


def _above(leaves: Sequence[Any], parents: dict[Any, list[Any]]) -> set[Any]:
    """The nodes from which one of the leaves is reached, and the leaves."""
    path = {leaf for leaf in leaves if leaf in parents}
    stack = list(path)
    while stack:
        for node in parents[stack.pop()]:
            if node not in path:
                path.add(node)
                stack.append(node)
    return path


def _owners(roots: Sequence[Any], nodes: Iterable[Any], path: set[Any]) -> dict[Any, Any]:
    """For each node beside the path: the junction that leads to it, or that only roots do, or that it belongs to the first part."""
    owners: dict[Any, Any] = {}
    claims = [(node, _ROOTS) for node in roots if node not in path]
    for node in nodes:
        if node not in path:
            continue
        owner = _FIRST_PART if isinstance(node, BackwardCFunction) or "Norm" in type(node).__name__ else node
        claims += [(child, owner) for child, _ in node.next_functions if child is not None and child not in path]
    while claims:
        node, owner = claims.pop()
        before = owners.get(node)
        if before is owner or before is _FIRST_PART:
            continue
        owners[node] = owner if before is None else _FIRST_PART
        claims += [(child, owners[node]) for child, _ in node.next_functions if child is not None]
    return owners
