"""`torch.export` as the way for what the recording cannot follow, such as `torch.cond`; refused where it is known to be
wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from autopipe.capture.captured import Captured
from autopipe.capture.compat import patched_function_apply
from autopipe.capture.effects import Effects, tensors_in
from autopipe.capture.loss import find_loss
from autopipe.capture.modules import has_hooks
from autopipe.capture.trace import Call


def export_trace(model: nn.Module, call: Call) -> Captured | None:
    """The model as `torch.export` (non-strict) captures it, or None where it cannot or must not be used.

    It replaces custom backwards, drops hooks and gives no gradients through reentrant checkpoints, each without a word
    (seen with torch 2.13): models that hold hooks or ran a custom `autograd.Function` are left to the other ways.
    """
    if call.loss_fn is not None or any(has_hooks(m) for m in model.modules()):
        return None
    custom: list[type] = []
    names, first = {}, dict[int, str]()
    for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names[name] = first.setdefault(id(t), name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with patched_function_apply(_noting(custom)):
                program = torch.export.export(model, call.args, dict(call.kwargs), strict=False)
            graph_module = program.module(check_guards=False)
    except Exception:  # noqa: BLE001 (any failure of the exporter means: not this way; the first cause is reported instead)
        return None
    if custom:
        return None
    graph_module._forward_pre_hooks.clear()
    graph_module._forward_pre_hooks_with_kwargs.clear()
    leaves, in_spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    graph = _flat_graph(graph_module.graph, names, constants)
    try:
        _find_effects(graph, graph_module, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
    except Exception:  # noqa: BLE001 (what cannot be run on fake tensors has no known groups, and cannot be cut)
        return None
    out_spec = program.call_spec.out_spec
    results: Any = graph.output_node().args[0]
    values = [n.meta.get("val") if isinstance(n, fx.Node) else n for n in results]
    output = pytree.tree_unflatten(values, out_spec)
    loss = find_loss(output, values)
    positions = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    graph.output_node().args = ([results[i] for i in positions],)
    return Captured(
        graph_module=fx.GraphModule(graph_module, graph, type(model).__name__),
        in_spec=in_spec,
        out_spec=out_spec,
        constants=constants,
        input_names=tuple(f"input {i}" for i in range(len(leaves))),
        out_constants={i: value for i, value in enumerate(values) if not isinstance(value, Tensor)},
        loss=None if loss is None else positions.index(loss),
        names=names,
        route="exported",
    )


def _noting(custom: list[type]) -> Callable[..., Any]:
    """Makes an `apply` that notes the user's autograd functions, whose backward the exporter replaces."""

    def make(base: Callable[..., Any]) -> Callable[..., Any]:
        def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            if cls is CheckpointFunction or not cls.__module__.startswith("torch."):
                custom.append(cls)
            return base(cls, *args, **kwargs)

        return apply

    return make


def _flat_graph(graph: fx.Graph, names: dict[str, str], constants: dict[int, Any]) -> fx.Graph:
    """The graph with one placeholder for each tensor input, a flat list as output, and tied parameters under one
    name."""
    graph.set_codegen(fx.graph.CodeGen())
    for i, node in enumerate([n for n in graph.nodes if n.op == "placeholder"]):
        if i in constants:
            node.replace_all_uses_with(constants[i])
            graph.erase_node(node)
    first: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr" and n.target in names]:
        canonical = names[node.target]
        node.target = canonical
        if first.setdefault(canonical, node) is not node:
            node.replace_all_uses_with(first[canonical])
            graph.erase_node(node)
    output = graph.output_node()
    results: Any = output.args[0]
    output.args = (list(results),)
    graph.lint()
    return graph


def _find_effects(graph: fx.Graph, root: nn.Module, inputs: list[Tensor]) -> None:
    """In-place groups: the graph is run once on fake tensors, and the versions of tensors are compared."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    effects, mode = Effects(), FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[str, Any] = {}
    given = iter(inputs)

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "placeholder":
                out = mode.from_tensor(next(given), static_shapes=True)
            elif n.op == "get_attr" and isinstance(attribute := self.fetch_attr(str(n.target)), Tensor):
                out = fakes.setdefault(str(n.target), mode.from_tensor(attribute, static_shapes=True))
            else:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                seen = effects.before(tensors_in(args, kwargs))
                out = super().run_node(n)
                if n.op not in ("get_attr", "output"):
                    effects.after(n, seen, out)
            if n.op != "output" and not isinstance(out, (nn.Module, type(None))):
                n.meta["val"] = out  # the exporter's own values do not say what is differentiable
            return out

    with mode:
        Run(root, graph=graph).run(*[None for n in graph.nodes if n.op == "placeholder"])
    batched = [n for n in graph.nodes if str(getattr(n.target, "__module__", "")).startswith("torch._functorch")]
    if batched:  # between the nodes that open and close a vmap, tensors are of a kind that does not cross
        order = list(graph.nodes)
        effects.keep_together(order[order.index(batched[0]) : order.index(batched[-1]) + 1])
    effects.finish(graph)
    for node in graph.nodes:
        if node.meta.get("writes"):
            node.meta["effect"] = True
