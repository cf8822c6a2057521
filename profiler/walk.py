"""Goes through a graph once: runs each new kind of node and measures it, and replays what is known for the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from profiler.call import Call, call_of
from profiler.graph import compute_nodes, is_region, last_readers, recomputed_nodes
from profiler.nodes import Timing
from profiler.signature import Signature, signature_of
from profiler.tensors import ModelTensors
from profiler.trace import Trace, output_values, run_traced
from profiler.values import Storage, Value, cut_from_graph, make_real, value_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Measurements of all nodes of one signature."""

    timing: Timing
    trace: Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One node as the walk met it: its call, its signature's record, its own trace, its output, and
    whether its forward runs again in the backward."""

    call: Call
    record: Record
    trace: Trace
    output: Any
    is_recomputed: bool


class Measure(Protocol):
    """Costs of a node that was just run."""

    def __call__(
        self, call: Call, trace: Trace, tensors: Sequence[Tensor], own: Mapping[str, Tensor], budget_s: float
    ) -> Timing: ...


class Records(Protocol):
    """Store of the records of signatures."""

    def get(self, signature: Signature) -> Record | None:
        """The record of a signature, if there is one."""

    def put(self, signature: Signature, record: Record) -> None:
        """Keeps a record."""


class Walk:
    """A pass over the graph in its own order.

    A node of a new signature is run on real values, under the modes that hold at its place, and measured. A node of a
    known signature is not run again unless later nodes may depend on its values (indices, masks, Python numbers): its
    output is known by shape and memory, and made up if a later node has to run on it. So a deep model costs what its
    distinct layers cost, and at any time only the values between two nodes are held.

    Args:
        model: the graph module.
        args: the values of the placeholders, on the device.
        device: where nodes run.
        tensors: the model's parameters and buffers.
        measure: called once for each signature.
        records: known signatures; new ones are added.
        budget_s: time for all measurements together.
        make_up_values: false to run every node on true values.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        args: Sequence[Any],
        device: torch.device,
        tensors: ModelTensors,
        measure: Measure,
        records: Records,
        budget_s: float,
        make_up_values: bool = True,
    ) -> None:
        self._model, self._args, self._device, self._tensors = model, args, device, tensors
        self._measure, self._records, self._make_up_values = measure, records, make_up_values
        self._deadline = time.perf_counter() + budget_s
        self._kinds_left = {_kind(n, model) for n in compute_nodes(model.graph)}
        self._moved = dict.fromkeys((torch.device("meta"), *tensors.devices()), device)
        self._env: dict[fx.Node, Any] = {}
        self._recomputed = recomputed_nodes(model.graph)
        self._storages: dict[str, Storage] = {}
        self.saved_bytes: dict[str, int] = {n.name: 0 for n in compute_nodes(model.graph)}
        self.made_up = False

    def run(self, visited: Callable[[Visit], None], arriving: Callable[[fx.Node], bool] | None = None) -> None:
        """Walks the graph, tells of each node before it is entered until that says stop, and reports each compute
        node."""
        inputs = iter(self._args)
        dying = last_readers(self._model.graph)
        for node in self._model.graph.nodes:
            if arriving is not None and not arriving(node):
                return
            if node.op == "placeholder":
                self._env[node] = self._input(next(inputs))
            elif node.op == "get_attr":
                self._env[node] = self._attribute(str(node.target))
            elif is_region(node):
                self._env[node] = node.target(*fx.node.map_arg(node.args, lambda n: self._env[n]))
            elif node.op != "output":
                visit = self._compute(node)
                self._env[node] = visit.output
                visited(visit)
            for dead in dying.get(node, ()):
                self._env.pop(dead, None)

    def real_output(self, node: fx.Node) -> Any:
        """The output of a node that later ones still read, with real tensors."""
        return pytree.tree_map_only(Value, self._real, self._env[node])

    def _input(self, arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        return value_of(arg, Storage(arg.untyped_storage().nbytes() if arg.layout == torch.strided else 0, None))

    def _attribute(self, target: str) -> Any:
        original = self._tensors.original(target)
        if not isinstance(original, Tensor):
            return original
        name = self._tensors.name_of(target) or target
        num_bytes = original.numel() * original.element_size()
        storage = self._storages.setdefault(name, Storage(num_bytes, None, param=name))
        value = value_of(original, storage, target)
        value.real = self._tensors.get(target) if self._tensors.is_resident(target) else None
        return value

    def _compute(self, node: fx.Node) -> Visit:
        own = {path: self._attribute(path) for path in self._tensors.own(node)}
        call = call_of(node, self._model, self._env, own, self._moved)
        signature = signature_of(call, self._device.type)
        record = self._records.get(signature)
        is_exact = all(v.is_exact or not v.is_float for v in (*call.values, *call.own.values()))
        if record is None or is_exact or not (self._make_up_values and record.trace.gives_floats):
            output, trace, record = self._execute(call, signature, record)
        else:
            output, trace, self.made_up = None, record.trace, True
        value, new = output_values(call, trace, output)
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Value):
                leaf.is_exact = is_exact
        if node in self._recomputed:
            self._charge_inputs(node)
        else:
            self._charge(call, trace, new)
        self._kinds_left.discard(_kind(node, self._model))
        return Visit(call=call, record=record, trace=trace, output=value, is_recomputed=node in self._recomputed)

    def _execute(self, call: Call, signature: Signature, record: Record | None) -> tuple[Any, Trace, Record]:
        with call.named_failure("run"):
            tensors = [self._real(v) for v in call.values]
            own = {path: self._real(v) for path, v in call.own.items()}
            output, trace = run_traced(call, tensors, own)
        if record is None:
            with call.named_failure("measured"):
                timing = self._measure(call, trace, tensors, own, self._share_s())
            record = Record(timing=timing, trace=trace)
            self._records.put(signature, record)
        for i in trace.written:
            call.values[i].requires_grad = tensors[i].requires_grad
        if any(v.target is not None and v.real is None for v in (*call.values, *call.own.values())):
            output = pytree.tree_map_only(Tensor, cut_from_graph, output)
        return output, trace, record

    def _real(self, value: Value) -> Tensor:
        if value.target is not None and value.real is None:
            return self._tensors.get(value.target)
        return make_real(value, self._device)

    def _share_s(self) -> float:
        """This node's share of the time that is left."""
        return max(0.0, self._deadline - time.perf_counter()) / max(1, len(self._kinds_left))

    def _charge(self, call: Call, trace: Trace, new: Sequence[Storage]) -> None:
        """Counts what the node keeps for backward, each storage once, for the node that made it."""
        sources = call.sources
        for place in trace.saved:
            self._hold(sources[place] if place >= 0 else new[-1 - place])
        self.saved_bytes[call.node.name] += trace.saved_inside_bytes

    def _charge_inputs(self, node: fx.Node) -> None:
        """A checkpoint keeps the tensors that it is given, and nothing of what its nodes keep."""
        for source in node.all_input_nodes:
            if self._recomputed.get(source) != self._recomputed[node]:
                for leaf in pytree.tree_leaves(self._env[source]):
                    if isinstance(leaf, Value):
                        self._hold(leaf.storage)

    def _hold(self, storage: Storage) -> None:
        if storage.owner is not None and not storage.saved:
            storage.saved = True
            self.saved_bytes[storage.owner] += storage.num_bytes


def _kind(node: fx.Node, model: fx.GraphModule) -> tuple[str, ...]:
    """Roughly the signature of a node, known before anything runs: how many of these are left shares out the time."""
    target = repr(model.get_submodule(str(node.target))) if node.op == "call_module" else str(node.target)
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return node.op, target, *(str(tuple(v.shape)) if isinstance(v, Tensor) else "" for v in values)
