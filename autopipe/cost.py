"""A profile and a link become a `CostGraph`: arrays of times, bytes and tensors, from which the cost of any stage follows.

Nodes that may not be cut apart (`NodeProfile.group`, groups that the caller adds, and the cycles that merging them makes)
are one node of the graph; its nodes are numbered in a topological order close to that of the profile.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profiler.records import LinkProfile, NodeProfile, Profile

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
DEFAULT_LINK = LinkProfile(latency_us=10.0, bytes_per_us=25_000.0, overlap=1.0, measured=False)
"""Stands in where no link was measured: 10 us and 25 GB/s, about PCIe 4.0 x16, everything overlapped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """Things (tensors, parameters) with the nodes that read them, flat: reader r belongs to thing `owner[r]`."""

    owner: IntArray
    node: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeClass:
    """One choice of what a stage computes again in the backward, and what each node then costs.

    Attributes:
        region: (nodes of the profile) the region that each node is in, -1 where it is not computed again.
        at_once: a stage is one region: all that it keeps is there again at once, for one micro-batch.
        saved_bytes, workspace_bytes: (n) as in `CostGraph`, with what is dropped left out and what is made again counted as
            workspace of the nodes of its region.
        recompute_us: (n) time that is added to the backward.
    """

    region: IntArray
    at_once: bool
    saved_bytes: FloatArray
    workspace_bytes: FloatArray
    recompute_us: FloatArray

    @property
    def is_none(self) -> bool:
        """Whether nothing is computed again."""
        return bool((self.region < 0).all())


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDevices:
    """What K stages run on, where their devices or links differ, or where replicas sum their gradients.

    Attributes:
        speed: (K) by which the compute of each stage is divided.
        latency_us, us_per_byte, exposed: (K, K) the link between two stages: a message of b bytes takes latency + b x us_per_byte,
            and compute does not hide the share `exposed` of it.
        reduce_latency_us, reduce_us_per_byte: (K) time of summing a stage's gradients over its replicas, after its last backward.
    """

    speed: FloatArray
    latency_us: FloatArray
    us_per_byte: FloatArray
    exposed: FloatArray
    reduce_latency_us: FloatArray
    reduce_us_per_byte: FloatArray

    def link(self, source: int, target: int) -> LinkProfile | None:
        """The link between two stages; None where both are on one rank."""
        per_byte = float(self.us_per_byte[source, target])
        if per_byte == 0.0:
            return None
        return LinkProfile(
            latency_us=float(self.latency_us[source, target]),
            bytes_per_us=1 / per_byte,
            overlap=1 - float(self.exposed[source, target]),
            measured=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CostGraph:
    """The graph that is cut. n nodes, T tensors that a node hands to others, P parameters and buffers.

    Attributes:
        members: (n) indices into `profile_names` of the profile's nodes that each node stands for.
        profile_names: names of the profile's nodes, in its order.
        forward_us, backward_us: (n) compute time of one micro-batch.
        saved_bytes, workspace_bytes: (n) bytes held from forward to backward, and most bytes held while it runs.
        predecessors, successors: (n) neighbours of each node.
        tensor_names: (T) the profile's nodes whose outputs these are; outputs read by the same nodes are one tensor.
        producer, tensor_bytes, gradient_bytes: (T) maker, bytes sent forward and bytes of the gradient that comes back.
        tensor_readers: who reads the tensors, the maker excluded.
        param_names, param_bytes, trainable: (P) parameters and buffers; one that several nodes share is one entry.
        param_readers: who reads the parameters.
        link: latency, bandwidth and overlap between stages.
        classes: what a stage may compute again: the first class under which it fits is taken.
        devices: what the stages run on; None: all alike, joined by `link`, and gradients are not summed over replicas.
    """

    members: tuple[tuple[int, ...], ...]
    profile_names: tuple[str, ...]
    forward_us: FloatArray
    backward_us: FloatArray
    saved_bytes: FloatArray
    workspace_bytes: FloatArray
    predecessors: tuple[tuple[int, ...], ...]
    successors: tuple[tuple[int, ...], ...]
    tensor_names: tuple[tuple[int, ...], ...]
    producer: IntArray
    tensor_bytes: FloatArray
    gradient_bytes: FloatArray
    tensor_readers: Readers
    param_names: tuple[str, ...]
    param_bytes: FloatArray
    trainable: NDArray[np.bool_]
    param_readers: Readers
    link: LinkProfile
    classes: tuple[RecomputeClass, ...]
    devices: StageDevices | None = None

    @property
    def num_nodes(self) -> int:
        """n, the number of nodes that a cut can tell apart."""
        return len(self.members)

    @property
    def work_us(self) -> FloatArray:
        """(n) forward plus backward time."""
        return self.forward_us + self.backward_us

    def speed(self, num_stages: int) -> FloatArray:
        """(K) by which the compute of each stage is divided."""
        return np.ones(num_stages) if self.devices is None else self.devices.speed

    @property
    def exposed(self) -> float:
        """The share 1 - o of a transfer that compute does not hide."""
        return 1.0 - self.link.overlap

    def closure(self, nodes: IntArray, neighbours: tuple[tuple[int, ...], ...]) -> NDArray[np.bool_]:
        """(n) the nodes and all that is reached from them over `predecessors` or `successors`."""
        reached, waiting = np.zeros(self.num_nodes, bool), nodes.tolist()
        while waiting:
            v = waiting.pop()
            if not reached[v]:
                reached[v] = True
                waiting += neighbours[v]
        return reached

    def node_of(self) -> IntArray:
        """(nodes of the profile) the node of this graph that stands for each."""
        node_of = np.empty(len(self.profile_names), np.int64)
        for i, members in enumerate(self.members):
            node_of[list(members)] = i
        return node_of


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
    members = _contract(profile, edges, [[index[name] for name in names] for names in together])
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
    nothing = RecomputeClass(
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
    """Whether a node stands for what the model is given, as `Input` does in PipeDream's profiles: its time is that of loading data."""
    return not node.inputs and not node.params and re.fullmatch(r"Input\d*", node.module) is not None


def indivisible(profile: Profile) -> tuple[tuple[int, ...], ...]:
    """The sets of the profile's nodes that may not be cut apart, the caller's wishes left out."""
    index = {node.name: i for i, node in enumerate(profile.nodes)}
    return _contract(profile, [(index[name], i) for i, node in enumerate(profile.nodes) for name in node.inputs], ())


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


def _parameters(profile: Profile, node_of: IntArray) -> dict[str, tuple[float, bool, set[int]]]:
    """Every parameter and buffer by name: bytes, whether it is trained, and the nodes that read it.

    Where the profile does not list sizes, the bytes of a node are split evenly over its names and counted as trained.
    """
    found: dict[str, tuple[float, bool, set[int]]] = {}
    for i, node in enumerate(profile.nodes):
        names = node.params or ((f"parameters of {node.name}",) if node.param_bytes else ())
        for name in names:
            known = profile.parameters.get(name)
            num_bytes = node.param_bytes / len(names) if known is None else float(known.bytes)
            before = found.get(name, (0.0, known is None or known.trainable, set()))
            found[name] = (max(before[0], num_bytes), before[1], before[2] | {int(node_of[i])})
    return found


def _contract(
    profile: Profile, edges: Sequence[tuple[int, int]], together: Iterable[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Groups and the cycles between them, as sets of the profile's nodes, in topological order."""
    parent = list(range(len(profile.nodes)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    groups: dict[str, list[int]] = {}
    for i, node in enumerate(profile.nodes):
        if node.group is not None:
            groups.setdefault(node.group, []).append(i)
    for group in [*groups.values(), *together]:
        for i in group[1:]:
            parent[find(i)] = find(group[0])
    root = [find(i) for i in range(len(profile.nodes))]
    component = _components(root, [(root[u], root[v]) for u, v in edges])
    return _numbered(component, edges)


def _components(root: Sequence[int], edges: Sequence[tuple[int, int]]) -> list[int]:
    """The strongly connected component of each node, by Tarjan's algorithm without recursion (SIAM J. Comput. 1972)."""
    successors: dict[int, set[int]] = {r: set() for r in root}
    for u, v in edges:
        if u != v:
            successors[u].add(v)
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    component: dict[int, int] = {}
    stack: list[int] = []
    for start in successors:
        if start in index:
            continue
        work = [(start, iter(sorted(successors[start])))]
        index[start] = low[start] = len(index)
        stack.append(start)
        while work:
            v, rest = work[-1]
            for x in rest:
                if x not in index:
                    index[x] = low[x] = len(index)
                    stack.append(x)
                    work.append((x, iter(sorted(successors[x]))))
                    break
                if x not in component:
                    low[v] = min(low[v], index[x])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[v])
                while low[v] == index[v] and v not in component:
                    component[stack.pop()] = v
    return [component[r] for r in root]


def _numbered(component: Sequence[int], edges: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """Members of each component; the components in topological order, those that come first in the profile first."""
    members: dict[int, list[int]] = {}
    for i, c in enumerate(component):
        members.setdefault(c, []).append(i)
    after: dict[int, set[int]] = {c: set() for c in members}
    for u, v in edges:
        if component[u] != component[v]:
            after[component[u]].add(component[v])
    waiting = dict.fromkeys(members, 0)
    for successors in after.values():
        for c in successors:
            waiting[c] += 1
    ready = [(group[0], c) for c, group in members.items() if not waiting[c]]
    heapq.heapify(ready)
    ordered: list[tuple[int, ...]] = []
    while ready:
        _, c = heapq.heappop(ready)
        ordered.append(tuple(members[c]))
        for x in after[c]:
            waiting[x] -= 1
            if not waiting[x]:
                heapq.heappush(ready, (members[x][0], x))
    return tuple(ordered)


def sum_by(index: IntArray, weights: FloatArray, size: int) -> FloatArray:
    """(size) the sum of the weights that carry each index."""
    return np.asarray(np.bincount(index, weights=weights, minlength=size), np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """What each of K stages costs for one micro-batch, as (K) arrays, and each pair of stages, as (K, K) arrays.

    Attributes:
        forward_us, backward_us: compute time.
        forward_exposed_us, backward_exposed_us: the share of transfers that is not hidden, at both ends.
        edge_bytes, edge_gradient_bytes: bytes from a stage to another, and of the gradients that come back.
        edge: whether anything goes from a stage to another.
        link: what a transfer costs.
        devices: what the stages run on, in the place of `link`, where they are not alike.
        reduce_us: time of summing a stage's gradients over the replicas.
    """

    forward_us: FloatArray
    backward_us: FloatArray
    forward_exposed_us: FloatArray
    backward_exposed_us: FloatArray
    edge_bytes: FloatArray
    edge_gradient_bytes: FloatArray
    edge: NDArray[np.bool_]
    link: LinkProfile
    devices: StageDevices | None = None
    reduce_us: FloatArray | None = None

    @property
    def load_us(self) -> FloatArray:
        """(K) time that a stage is busy with one micro-batch: compute and the share of transfers that is not hidden."""
        return self.forward_us + self.backward_us + self.forward_exposed_us + self.backward_exposed_us

    def busy_us(self) -> tuple[FloatArray, FloatArray]:
        """(K), (K) forward and backward time of a stage with the exposed share of every message that it sends or receives.

        Unlike in `load_us`, each pair of stages has a message of its own, and a tensor that two stages read is sent twice: that
        is what the engine does, and what is simulated. It is never less than `load_us`.
        """
        there, back, exposed = self._messages_us()
        there, back = there * exposed, back * exposed
        forward = self.forward_us + there.sum(axis=0) + there.sum(axis=1)
        return forward, self.backward_us + back.sum(axis=0) + back.sum(axis=1)

    def links(self) -> dict[tuple[int, int], tuple[float, float | None]]:
        """For each pair of stages with traffic, how long its message holds the link beside compute, forward and back.

        The second is None where no gradient comes back.
        """
        there, back, exposed = self._messages_us()
        there, back = there * (1 - exposed), back * (1 - exposed)
        found: dict[tuple[int, int], tuple[float, float | None]] = {}
        for source, target in np.argwhere(self.edge).tolist():
            has_gradient = bool(self.edge_gradient_bytes[source, target])
            found[source, target] = (
                float(there[source, target]),
                float(back[source, target]) if has_gradient else None,
            )
        return found

    def _messages_us(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(K, K) time of the message from a stage to another, of the gradient that comes back, and the share not hidden."""
        devices, everywhere = self.devices, np.ones_like(self.edge_bytes)
        latency = everywhere * self.link.latency_us if devices is None else devices.latency_us
        per_byte = everywhere / self.link.bytes_per_us if devices is None else devices.us_per_byte
        exposed = everywhere * (1 - self.link.overlap) if devices is None else devices.exposed
        there = np.where(self.edge, latency + self.edge_bytes * per_byte, 0.0)
        back = np.where(self.edge_gradient_bytes > 0, latency + self.edge_gradient_bytes * per_byte, 0.0)
        return there, back, exposed


def stage_costs(graph: CostGraph, stage_of: IntArray, num_stages: int) -> StageCosts:
    """Costs of the stages under an assignment `stage_of` (n) of nodes to stages.

    A tensor costs its maker's stage b/B once and every stage that reads it b/B once, its gradient the same way back (the load
    of Tarnawski et al., NeurIPS 2020); the latency comes once for each side of a stage that anything crosses, each way.
    """
    K, link = num_stages, graph.link
    crossing, target = crossings(graph, stage_of, K)
    source = stage_of[graph.producer[crossing]]
    sent = np.unique(crossing)

    def exposed(num_bytes: FloatArray, edge: NDArray[np.bool_]) -> FloatArray:
        out = sum_by(stage_of[graph.producer[sent]], num_bytes[sent], K)
        into = sum_by(target, num_bytes[crossing], K)
        messages = edge.any(axis=0).astype(float) + edge.any(axis=1)
        return np.asarray(graph.exposed * ((out + into) / link.bytes_per_us + link.latency_us * messages), float)

    def between(weights: FloatArray) -> FloatArray:
        return sum_by(source * K + target, weights, K * K).reshape(K, K)

    edge = between(np.ones(len(crossing))) > 0
    gradients = between(graph.gradient_bytes[crossing])
    devices = graph.devices
    speed = graph.speed(K)
    return StageCosts(
        forward_us=sum_by(stage_of, graph.forward_us, K) / speed,
        backward_us=sum_by(stage_of, graph.backward_us, K) / speed,
        forward_exposed_us=exposed(graph.tensor_bytes, edge),
        backward_exposed_us=exposed(graph.gradient_bytes, gradients > 0),
        edge_bytes=between(graph.tensor_bytes[crossing]),
        edge_gradient_bytes=gradients,
        edge=edge,
        link=link,
        devices=devices,
        reduce_us=None if devices is None else _reduce_us(graph, devices, stage_of),
    )


def _reduce_us(graph: CostGraph, devices: StageDevices, stage_of: IntArray) -> FloatArray:
    """(K) time of summing the gradients of each stage over its replicas; 0 where it trains nothing."""
    K, readers = len(devices.speed), graph.param_readers
    held = np.unique(readers.owner * K + stage_of[readers.node])
    num_bytes = sum_by(held % K, (graph.param_bytes * graph.trainable)[held // K], K)
    return np.where(num_bytes > 0, devices.reduce_latency_us + devices.reduce_us_per_byte * num_bytes, 0.0)


def crossings(graph: CostGraph, stage_of: IntArray, num_stages: int) -> tuple[IntArray, IntArray]:
    """Tensors that cross and the stages that read them, one entry for each (tensor, stage)."""
    owner = graph.tensor_readers.owner
    target = stage_of[graph.tensor_readers.node]
    crossing = target != stage_of[graph.producer[owner]]
    keys = np.unique(owner[crossing] * num_stages + target[crossing])
    return keys // num_stages, keys % num_stages
