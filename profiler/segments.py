"""Corrections that the sum of the nodes misses: contiguous segments are run as a training engine runs a stage, and
compared with it.

A node that is timed by itself finds its inputs in the cache and its memory at hand, starts from Python each time, and
never adds up the gradients of a value with several readers. A segment shows the sum of these effects.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from profiler.clock import Clock
from profiler.graph import is_compute, is_region
from profiler.memory import tensors_in
from profiler.records import NodeProfile
from profiler.state import preserved_modes, swapped
from profiler.tensors import ModelTensors

NUM_SEGMENTS, NUM_REPEATS = 4, 8
MAX_REPEATS, SHORT_S = 40, 0.4
"""A segment is repeated up to so often while all its repeats together take less than this: what a machine does besides
passes in waves."""
IN_FLIGHT = 2
"""Micro-batches whose activations are held at once, as on a stage: fresh memory is slower than memory that was just
released."""
MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES, PARAMETERS_SHARE = 2**30, 2**27, 1 / 16
"""A segment holds at most this share of the model's parameters, within these bounds, parameters, gradients and
activations together: models larger than the device work, and a rank that measures holds little beside its stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A contiguous part of a graph.

    Attributes:
        nodes: its nodes, those that name parameters and switch modes included.
        inputs: the nodes outside whose values it reads.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]


def choose_segments(graph: fx.Graph, profiles: Sequence[NodeProfile], budget_s: float) -> list[Segment]:
    """Up to four segments that begin at a quarter of the time each, as long as time and memory allow."""
    costs = {p.name: p for p in profiles}
    order = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    total_us = sum(p.forward_us + p.backward_us for p in profiles)
    limit_us = min(total_us / NUM_SEGMENTS, budget_s * 1e6 / (NUM_SEGMENTS * (NUM_REPEATS + IN_FLIGHT)))
    share = int(PARAMETERS_SHARE * sum(p.param_bytes for p in profiles))
    limit_bytes = min(MAX_SEGMENT_BYTES, max(MIN_SEGMENT_BYTES, share))
    starts: list[int] = []
    seen_us = 0.0
    for i, node in enumerate(order):
        if node.op != "get_attr" and len(starts) < NUM_SEGMENTS and seen_us >= total_us * len(starts) / NUM_SEGMENTS:
            starts.append(i)
        seen_us += _time_us(costs.get(node.name))
    ends = [*starts[1:], len(order)]
    parts = [_taken(order[a:b], costs, limit_us, limit_bytes) for a, b in zip(starts, ends, strict=True)]
    return [_segment(nodes) for nodes in parts if any(is_compute(n) for n in nodes)]


def _time_us(cost: NodeProfile | None) -> float:
    return cost.forward_us + cost.backward_us if cost else 0.0


def _taken(
    nodes: Sequence[fx.Node], costs: Mapping[str, NodeProfile], limit_us: float, limit_bytes: int
) -> list[fx.Node]:
    """The first of the nodes, up to the limits; never the end of an autocast region without its beginning."""
    taken: list[fx.Node] = []
    time_us, held = 0.0, 0
    for node in nodes:
        cost = costs.get(node.name)
        held += IN_FLIGHT * (cost.saved_bytes + cost.output_bytes) + 3 * cost.param_bytes if cost else 0
        leaves_region = is_region(node) and any(n not in taken for n in node.all_input_nodes)
        if leaves_region or (time_us > 0 and (time_us >= limit_us or held > limit_bytes)):
            break
        taken.append(node)
        time_us += _time_us(cost)
    return taken


def _segment(nodes: Sequence[fx.Node]) -> Segment:
    inside = set(nodes)
    read = dict.fromkeys(source for n in nodes for source in n.all_input_nodes if source not in inside)
    return Segment(nodes=tuple(nodes), inputs=tuple(read))


def segment_module(model: fx.GraphModule, segment: Segment) -> fx.GraphModule:
    """The segment as a module of its own, on the model's own submodules: its inputs in, what is read after it out."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for source in segment.inputs:
        if source.op == "get_attr":
            copies[source] = graph.node_copy(source)
        else:
            copies[source] = graph.placeholder(source.name)
    for node in segment.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    inside = set(segment.nodes)
    outputs = [n for n in segment.nodes if is_compute(n) and (not n.users or any(u not in inside for u in n.users))]
    graph.output(tuple(copies[n] for n in outputs))
    return fx.GraphModule(model, graph)


class SegmentTimer:
    """Times segments as a stage runs them: the forward of a micro-batch, then the backward of the one before it.

    Args:
        model: the graph module.
        tensors: its parameters and buffers, as nodes are run with them.
        clock: of the device.
        backward_start_us: time of starting a backward pass, which is not part of the nodes' times either.
    """

    def __init__(self, model: fx.GraphModule, tensors: ModelTensors, clock: Clock, backward_start_us: float) -> None:
        self._model, self._tensors, self._clock = model, tensors, clock
        self._backward_start_us = backward_start_us

    def measure_us(self, segment: Segment, values: Sequence[Any]) -> tuple[float, float]:
        """Median times of forward and of backward.

        Args:
            segment: the segment.
            values: one for each of its inputs that is not a `get_attr` node; the grad and autocast modes are those at
                its beginning.
        """
        module = segment_module(self._model, segment)
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        own = {name: self._tensors.get(name) for name, _ in named}
        inputs = [pytree.tree_map_only(Tensor, _leaf, v) for v in values]
        leaves = [t for t in {id(t): t for t in (*tensors_in(inputs), *own.values())}.values() if t.requires_grad]
        totals = [torch.zeros_like(t) if any(t is o for o in own.values()) else None for t in leaves]
        waiting: deque[list[Tensor]] = deque()
        forward, backward = list[float](), list[float]()
        with swapped(module, own):
            deadline = time.perf_counter() + SHORT_S
            for i in range(MAX_REPEATS + IN_FLIGHT):
                if i >= NUM_REPEATS + IN_FLIGHT and time.perf_counter() > deadline:
                    break
                forward_us, outputs = self._forward(module, inputs)
                waiting.append(outputs)
                is_warm = i >= IN_FLIGHT
                if len(waiting) == IN_FLIGHT:
                    backward_us = self._backward(waiting.popleft(), leaves, totals)
                    backward += [backward_us] if is_warm else []
                forward += [forward_us] if is_warm else []
        return statistics.median(forward), statistics.median(backward)

    def _forward(self, module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[float, list[Tensor]]:
        with preserved_modes():
            # Clones: a segment may write to what it is given.
            args = pytree.tree_map_only(Tensor, torch.clone, list(inputs))
            start = self._clock.mark()
            result = module(*args)
            time_us = self._clock.elapsed_us(start, self._clock.mark())
        return time_us, [t for t in {id(t): t for t in tensors_in(result)}.values() if t.requires_grad]

    def _backward(self, outputs: list[Tensor], leaves: Sequence[Tensor], totals: Sequence[Tensor | None]) -> float:
        if not outputs or not leaves:
            return 0.0
        grads = [torch.randn_like(o) for o in outputs]
        start = self._clock.mark()
        found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        for grad, total in zip(found, totals, strict=True):
            if grad is not None and total is not None:
                total.add_(grad)
        return max(0.0, self._clock.elapsed_us(start, self._clock.mark()) - self._backward_start_us)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
