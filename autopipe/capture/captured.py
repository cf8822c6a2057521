"""The result of capture: the graph of a model at micro-batch size, and how values go in and come out of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopipe.capture.effects import remove_dead_code
from autopipe.capture.guards import guard, guard_plain, guard_shape
from autopipe.capture.regions import emit_regions
from autopipe.errors import CaptureError
from profiler.graph import compute_nodes, is_region


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A model captured as a graph.

    Attributes:
        graph_module: takes the tensors among the flattened inputs, in order, and returns the tensors among the
            flattened outputs as a list; where a loss function was given, the loss comes last. Its submodules and
            parameters are the model's own, under the model's names.
        in_spec, out_spec: tree structure of `(args, kwargs)` and of the output.
        constants: the flattened inputs that are no tensors, by position; their values are part of the graph.
        input_names: a name for each flattened input, for messages.
        out_constants: the flattened outputs that are no tensors, by position.
        loss: position of the loss among the graph's outputs, None where the model has none.
        names: every name of a parameter or buffer to its first name; tied ones have several.
        route: how it was captured: `recorded`, `recorded, compiling`, `opaque`, `exported` or `guarded`.
        opaque: modules kept whole because their Python reads values, with the reason.
    """

    graph_module: fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    constants: Mapping[int, Any]
    input_names: tuple[str, ...]
    out_constants: Mapping[int, Any] = field(default_factory=dict)
    loss: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    route: str = "recorded"
    opaque: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the captured graph as the model is called; the output has the model's own structure."""
        outputs = self.graph_module(*self.flatten(args, kwargs))
        return self.unflatten(outputs)

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call, in the order of the graph's inputs.

        Raises:
            CaptureError: the structure or a value that is no tensor differs from the captured call.
        """
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        if spec != self.in_spec:
            raise CaptureError(
                f"a call of structure {spec}",
                expected=f"{self.in_spec}",
                remedy="capture the model again for this call",
            )
        for i, value in self.constants.items():
            if leaves[i] is not value and leaves[i] != value:
                name = self.input_names[i]
                raise CaptureError(
                    f"{name} = {leaves[i]!r}", expected=repr(value), remedy="capture the model again for this value"
                )
        return [leaf for i, leaf in enumerate(leaves) if i not in self.constants]

    def unflatten(self, outputs: list[Tensor]) -> Any:
        """The model's own output structure from the graph's outputs."""
        rest = iter(outputs)
        leaves = [
            self.out_constants[i] if i in self.out_constants else next(rest) for i in range(self.out_spec.num_leaves)
        ]
        return pytree.tree_unflatten(leaves, self.out_spec)

    def loss_only(self) -> Captured:
        """The same capture whose graph returns the loss alone, without what only other outputs need."""
        assert self.loss is not None
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.graph_module.graph.nodes:
            if node.op == "output":
                graph.output([copies[node.args[0][self.loss]]])
            elif not is_region(node):
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        remove_dead_code(graph)
        emit_regions(graph)
        module = fx.GraphModule(self.graph_module, graph, type(self.graph_module).__name__)
        return dataclasses.replace(self, graph_module=module, loss=0)

    @property
    def nodes(self) -> list[fx.Node]:
        """The compute nodes, in order."""
        return compute_nodes(self.graph_module.graph)

    @property
    def graph_hash(self) -> str:
        """Identifies the computation: operators, wiring, shapes and names, not the values of parameters."""
        digest = hashlib.sha256()
        for node in self.graph_module.graph.nodes:
            value = node.meta.get("val")
            shape = (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else ""
            digest.update(
                repr((node.name, node.op, _target_name(node), str(node.args), str(node.kwargs), shape)).encode()
            )
        return digest.hexdigest()[:16]

    def report(self) -> str:
        """The capture in a few lines."""
        lines = [f"captured by: {self.route}; {len(self.nodes)} nodes"]
        lines += [f"kept whole: {name} ({reason})" for name, reason in self.opaque.items()]
        lines += [f"checked at each run: {text}" for text in self.guards]
        return "\n".join(lines)

    @property
    def guards(self) -> tuple[str, ...]:
        """A value that Python read while the model was captured, with which every run is compared: the value and where
        it is read."""
        found = []
        for node in self.nodes:
            place = node.meta.get("source", "")
            if node.target is guard:
                found.append(f"Tensor.{node.args[0]}() gives {node.args[1]!r}, {place}")
            elif node.target is guard_plain:
                found.append(f"{node.args[0]} has numbers {node.args[1]} beside its tensors, {place}")
            elif node.target is guard_shape:
                found.append(f"{node.args[0]} has shape {node.args[1]}, {place}")
        return tuple(found)


def _target_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__qualname__", str(node.target))
