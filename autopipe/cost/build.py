"""A profile and a link become a `CostGraph`.

Nodes that may not be cut apart are one node of the graph; its nodes are numbered in a topological order close to that
of the profile.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from autopipe.cost.contraction import contract
from autopipe.cost.graph import CostGraph, FloatArray, IntArray, Readers, RecomputeOption, sum_by
from profiler.records import LinkProfile, NodeProfile, Profile

DEFAULT_LINK = LinkProfile(latency_us=10.0, bytes_per_us=25_000.0, overlap=1.0, measured=False)
"""Stands in where no link was measured: 10 us and 25 GB/s, about PCIe 4.0 x16, everything overlapped."""


def build_cost_graph(profile: Profile, link: LinkProfile, together: Iterable[Sequence[str]] = ()) -> CostGraph:
    """The graph of a profile over one kind of link.

    Args:
        profile: the costs; its `residual` scales every time.
        link: what a transfer between two stages costs.
        together: lists of names of the profile's nodes that stay on one stage, beyond `NodeProfile.group`.
    """
    nodes = profile.nodes
    index = {node.name: i for i, node in enumerate(nodes)}
    edges = [(index[name], i) for i, node in enumerate(nodes) for name in node.inputs]
    members = contract(profile, edges, [[index[name] for name in names] for names in together])
    node_of = np.empty(len(nodes), np.int64)
    for i, group in enumerate(members):
        node_of[list(group)] = i
    pairs = sorted({(int(node_of[u]), int(node_of[v])) for u, v in edges if node_of[u] != node_of[v]})
    predecessors: list[list[int]] = [[] for _ in members]
    successors: list[list[int]] = [[] for _ in members]
    for u, v in pairs:
        successors[u].append(v)
        predecessors[v].append(u)

    def total(values: Iterable[float]) -> FloatArray:
        return sum_by(node_of, np.array(list(values), float), len(members))

    workspace = np.zeros(len(members))
    np.maximum.at(workspace, node_of, np.array([node.workspace_bytes for node in nodes], float))
    tensors = _tensors(profile, edges, node_of)
    params = _parameters(profile, node_of)
    saved = total(node.saved_bytes for node in nodes)
    nothing = RecomputeOption(
        region=np.full(len(nodes), -1, np.int64),
        at_once=False,
        saved_bytes=saved,
        workspace_bytes=workspace,
        recompute_us=np.zeros(len(members)),
    )
    computes = [not is_model_input(node) for node in nodes]
    return CostGraph(
        members=members,
        profile_names=tuple(node.name for node in nodes),
        forward_us=total(node.forward_us * c for node, c in zip(nodes, computes, strict=True)) * profile.residual,
        backward_us=total(node.backward_us * c for node, c in zip(nodes, computes, strict=True)) * profile.residual,
        saved_bytes=saved,
        workspace_bytes=workspace,
        predecessors=tuple(map(tuple, predecessors)),
        successors=tuple(map(tuple, successors)),
        tensor_names=tuple(tuple(names) for names in tensors.values()),
        producer=np.array([p for p, _ in tensors], np.int64),
        tensor_bytes=np.array([sum(nodes[i].output_bytes for i in names) for names in tensors.values()], float),
        gradient_bytes=np.array(
            [sum(nodes[i].output_bytes for i in names if nodes[i].differentiable) for names in tensors.values()], float
        ),
        tensor_readers=_flat([readers for _, readers in tensors]),
        param_names=tuple(params),
        param_bytes=np.array([num_bytes for num_bytes, _, _ in params.values()], float),
        trainable=np.array([trainable for _, trainable, _ in params.values()], bool),
        param_readers=_flat([sorted(readers) for _, _, readers in params.values()]),
        link=link,
        classes=(nothing,),
    )


def is_model_input(node: NodeProfile) -> bool:
    """Whether a node stands for what the model is given, as `Input` does in PipeDream's profiles: its time is that of
    loading data."""
    return not node.inputs and not node.params and re.fullmatch(r"Input\d*", node.module) is not None


def _flat(readers: Sequence[Sequence[int]]) -> Readers:
    owner = np.repeat(np.arange(len(readers)), [len(r) for r in readers]).astype(np.int64)
    return Readers(owner=owner, node=np.array([v for r in readers for v in r], np.int64))


def _tensors(
    profile: Profile, edges: Sequence[tuple[int, int]], node_of: IntArray
) -> dict[tuple[int, tuple[int, ...]], list[int]]:
    """Outputs that leave their node, by (maker, readers): those that agree in both always travel together."""
    readers: dict[int, set[int]] = {}
    for u, v in edges:
        if node_of[u] != node_of[v]:
            readers.setdefault(u, set()).add(int(node_of[v]))
    tensors: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for u in range(len(profile.nodes)):
        if u in readers:
            tensors.setdefault((int(node_of[u]), tuple(sorted(readers[u]))), []).append(u)
    return tensors


def param_names(node: NodeProfile) -> tuple[str, ...]:
    """The parameters of a node, or a name for all of them where the profile lists none."""
    return node.params or ((f"parameters of {node.name}",) if node.param_bytes else ())


def _parameters(profile: Profile, node_of: IntArray) -> dict[str, tuple[float, bool, set[int]]]:
    """Every parameter and buffer by name: bytes, whether it is trained, and the nodes that read it.

    Where the profile does not list sizes, the bytes of a node are split evenly over its names and counted as trained.
    """
    found: dict[str, tuple[float, bool, set[int]]] = {}
    for i, node in enumerate(profile.nodes):
        names = param_names(node)
        for name in names:
            known = profile.parameters.get(name)
            num_bytes = node.param_bytes / len(names) if known is None else float(known.bytes)
            before = found.get(name, (0.0, known is None or known.trainable, set()))
            found[name] = (max(before[0], num_bytes), before[1], before[2] | {int(node_of[i])})
    return found
