"""A stage's backward in two parts: first the gradients that the stage before waits for, later those of the parameters.

The autograd graph of a stage is walked from its outputs. A node lies on the *path* if an input of the stage is reached
from it. A node of the path that also leads off it, to parameters, is a *junction*:

    output ── gelu ── addmm ── layer_norm ── input        the path
                        │          │
                     weight, bias  weight, bias           beside it

The first part runs the path alone and catches the gradient that arrives at each junction; autograd computes only what
is asked for, so an `addmm` there multiplies once and not twice. The second part computes from each junction what lies
beside the path. The idea is that of zero-bubble schedules (Qi et al. 2023, https://arxiv.org/abs/2401.10241).

Some parameters get their gradients in the first part, since the second would count or compute something twice: those
reached from several junctions (a weight that a stage uses twice), those of normalisations (their backward gives all
gradients in one pass), those read by a Python `autograd.Function` that lies on the path (its backward would be called
twice), and those in a checkpoint region (it would be computed once more).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from autopipe.capture.checkpointing import CheckpointRegion
from autopipe.stages import StageModule

_ROOTS, _FIRST_PART = "roots", "first part"
SHORT_PATH = 120
"""Nodes of a path up to which a backward from each junction takes less time than calling the junctions does
(`benchmarks/weight_gradients.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Limits to dividing the backward of a stage.

    Attributes:
        whole: it cannot be divided: a backward hook would be called in both parts.
        with_inputs: parameters whose gradients belong to the first part.
    """

    whole: bool = False
    with_inputs: frozenset[nn.Parameter] = frozenset()


def division_of(module: StageModule) -> Division:
    """Look for backward hooks and checkpoint regions in a stage."""
    regions = [m for m in module.modules() if isinstance(m, CheckpointRegion)]
    bodies = [module, *(region.body for region in regions)]
    parts = [m for body in bodies for m in body.modules()]
    hooks = any(m._backward_hooks or m._backward_pre_hooks for m in parts)
    hooks = hooks or any(n.op == "call_method" and n.target == "register_hook" for b in bodies for n in b.graph.nodes)
    return Division(whole=hooks, with_inputs=frozenset(p for region in regions for p in region.body.parameters()))


@dataclass(frozen=True, slots=True)
class _Junction:
    """A start of the second part.

    Attributes:
        node: the node of the path.
        gradients: those that have arrived at it.
        beside: the edges off the path, each with the place of its gradient among those that the node returns.
        parameters: those that these edges lead to.
    """

    node: Any
    gradients: Sequence[Tensor | None]
    beside: Sequence[tuple[int, GradientEdge]]
    parameters: Sequence[Tensor]


def _start_at_each(junctions: deque[_Junction]) -> None:
    """Run a backward from each junction.

    Each first walks all that lies below, up to the stage's inputs, so the time grows with the square of the stage's
    length.
    """
    while junctions:
        junction = junctions.popleft()
        arrived = [(GradientEdge(junction.node, i), g) for i, g in enumerate(junction.gradients) if g is not None]
        edges, gradients = [edge for edge, _ in arrived], [gradient for _, gradient in arrived]
        torch.autograd.backward(edges, gradients, inputs=junction.parameters)


def _call_each(junctions: deque[_Junction]) -> None:
    """Call each junction for its gradients beside the path, and run a backward from there.

    A node that is called computes what the backward around the call asks for. The backward here asks for the gradients
    at the edges beside the path, and executes only the copy of a leaf, whose hook makes the calls.
    """

    def call(_: Sequence[Tensor]) -> None:
        while junctions:
            junction = junctions.popleft()
            given = junction.node(*junction.gradients)
            given = given if isinstance(given, tuple) else (given,)
            pairs = [(e, _fitting(given[i], e)) for i, e in junction.beside if given[i] is not None]
            torch.autograd.backward([e for e, _ in pairs], [g for _, g in pairs], inputs=junction.parameters)

    leaf = torch.zeros((), requires_grad=True)
    called = leaf.clone()
    get_gradient_edge(called).node.register_prehook(call)
    caught: list[Any] = [leaf, *(edge for junction in junctions for _, edge in junction.beside)]
    torch.autograd.grad(called, caught, allow_unused=True)
    assert not junctions, "a backward that did not reach its leaf"


def _fitting(gradient: Tensor, edge: GradientEdge) -> Tensor:
    """A gradient in the shape and dtype that is due at an edge, as autograd makes it of what a node gives."""
    due = edge.node._input_metadata[edge.output_nr]
    if gradient.is_complex() and not due.dtype.is_complex:
        gradient = gradient.real
    if gradient.shape != due.shape:
        gradient = gradient.sum_to_size(due.shape)
    return gradient.to(due.dtype)


class WeightGradients:
    """The second part, to be run once. It keeps the stage's activations alive until then.

    Args:
        roots, gradients: tensors to differentiate that do not depend on the stage's inputs, and theirs.
        parameters: those that are reached from such roots alone; empty if that is not known.
        junctions: from where all other parameters are reached.
        from_junctions: adds their gradients, and takes the junctions away.
    """

    def __init__(
        self,
        roots: Sequence[Tensor] = (),
        gradients: Sequence[Tensor | None] = (),
        parameters: Sequence[Tensor] = (),
        junctions: Iterable[_Junction] = (),
        from_junctions: Callable[[deque[_Junction]], None] = _start_at_each,
    ) -> None:
        self._roots, self._gradients, self._parameters = roots, gradients, parameters
        self._junctions, self._from_junctions = deque(junctions), from_junctions

    def run(self) -> None:
        """Add the gradients to the parameters' `.grad`."""
        if self._roots:
            torch.autograd.backward(self._roots, self._gradients, inputs=self._parameters or None)
        self._roots = self._gradients = self._parameters = ()
        self._from_junctions(self._junctions)


def input_gradients(
    roots: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor], division: Division
) -> WeightGradients:
    """Run the first part: add the gradients of `inputs` to their `.grad`, and return what is left to do.

    Args:
        roots, gradients: as for `torch.autograd.backward`.
        inputs: leaves that require a gradient.
    """
    if not roots:
        return WeightGradients()
    if division.whole:
        torch.autograd.backward(roots, gradients)
        return WeightGradients()
    root_nodes = [get_gradient_edge(r).node for r in roots]
    parents = _parents(root_nodes)
    path = _above([get_gradient_edge(i).node for i in inputs], parents)
    if not path:
        return WeightGradients(roots, gradients)
    owners = _owners(root_nodes, parents, path)
    parameters: dict[Any, list[Tensor]] = {}
    first: list[Tensor] = list(inputs)
    for node, owner in owners.items():
        if type(node).__name__ == "AccumulateGrad":
            if owner is _FIRST_PART or node.variable in division.with_inputs:
                first.append(node.variable)
            else:
                parameters.setdefault(owner, []).append(node.variable)
    of_roots = parameters.pop(_ROOTS, [])
    caught: dict[Any, Sequence[Tensor | None]] = {}
    hooks = [node.register_prehook(partial(_catch, caught, node)) for node in parameters]
    torch.autograd.backward(roots, gradients, retain_graph=bool(parameters or of_roots), inputs=first)
    for hook in hooks:
        hook.remove()
    alone = [i for i, n in enumerate(root_nodes) if of_roots and n not in path]
    junctions = [
        _Junction(node, caught[node], _edges(node, owners), lead_to)
        for node, lead_to in parameters.items()
        if any(g is not None for g in caught.get(node, ()))
    ]
    from_junctions = _start_at_each if len(path) <= SHORT_PATH else _call_each
    return WeightGradients(
        [roots[i] for i in alone], [gradients[i] for i in alone], of_roots, junctions, from_junctions
    )


def _edges(junction: Any, owners: dict[Any, Any]) -> list[tuple[int, GradientEdge]]:
    """The edges by which a junction leads off the path to what it alone leads to."""
    children = enumerate(junction.next_functions)
    return [(i, GradientEdge(child, place)) for i, (child, place) in children if owners.get(child) is junction]


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
    """The owner of each node beside the path: the junction that leads to it, the roots alone, or the first part."""
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
