"""One recording of a model: fake tensors in the place of its parameters, its forward run once, the graph made from what
was called."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from autopipe.capture.captured import Captured
from autopipe.capture.compat import compiling_flag, eager_stance, is_scripted, register_dataclass, swap_parameters
from autopipe.capture.effects import remove_dead_code
from autopipe.capture.guards import GUARDS, Evaluator, Permission
from autopipe.capture.loss import LOSS_MODULE, LossFunction, LossModule, find_loss
from autopipe.capture.modules import ModuleCalls, has_hooks
from autopipe.capture.opaque import real_like
from autopipe.capture.places import Places, is_method
from autopipe.capture.reading import Untraceable
from autopipe.capture.recorder import Recorder
from autopipe.capture.regions import emit_regions


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of the model: a micro-batch as `model(*args, **kwargs)` takes it, and the loss function with its
    target."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss_fn: LossFunction | None = None
    target: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureMode:
    """Mode of recording a model.

    Attributes:
        opaque: places that are kept whole: modules by name, methods as `name:method`.
        compiling: let `torch.compiler.is_compiling()` be true meanwhile.
        real: run on the real tensors, so that places kept whole see real values.
        guarded: run on the real tensors, and record all values that Python reads as equality guards.
        guard_in: modules in whose own code values may become equality guards: on fake tensors those that follow from
            the inputs alone, on real ones all but those drawn at random.
        answers_in: modules in whose own code the answers to yes-no questions alone may.
        fixed: there, shapes that depend on values become guards too; else they may vary, and no Python may ask for
            them.
    """

    opaque: frozenset[str] = frozenset()
    compiling: bool = False
    real: bool = False
    guarded: bool = False
    guard_in: frozenset[str] = frozenset()
    answers_in: frozenset[str] = frozenset()
    fixed: bool = False

    @property
    def name(self) -> str:
        """The text of `Captured.route`."""
        if self.guarded or self.guard_in or self.answers_in:
            return "guarded"
        return "opaque" if self.opaque else "recorded, compiling" if self.compiling else "recorded"


class TraceFailure(Exception):
    """A recording failed; `module` is the FQN of the innermost module that was running, None outside all modules.

    `method`: the method of a module in which it failed, as `name:method`, None in a forward.
    """

    def __init__(self, cause: Exception, module: str | None, method: str | None = None) -> None:
        super().__init__(str(cause))
        self.cause, self.module, self.method = cause, module, method


State = dict[tuple[str, str], Any]


def trace(model: nn.Module, call: Call, way: CaptureMode = CaptureMode()) -> Captured:
    """Records the model; where its forward changes plain attributes of modules (a counter), makes sure that they do not
    steer it.

    Raises:
        TraceFailure: the model's Python could not be run this way, or its next call would be another graph.
    """
    captured, state = _record(model, call, {}, way)
    state = {key: value for key, value in state.items() if key[0] not in way.opaque}
    if state:
        again, _ = _record(model, call, state, way)
        if again.graph_hash != captured.graph_hash:
            module, attribute = next(iter(state))
            cause = Untraceable(
                f"attribute {attribute!r} of module {module!r}, which forward changes, steers what the next call "
                "computes"
            )
            raise TraceFailure(cause, module)
    return captured


def _record(model: nn.Module, call: Call, start: State, way: CaptureMode) -> tuple[Captured, State]:
    """Records one call of the model, its modules' attributes set to `start`; returns the attributes that the call
    changed too.

    Raises:
        TraceFailure: the model's Python could not be run this way.
    """
    fake_mode = None if way.guarded or way.real else FakeTensorMode(allow_non_fake_inputs=True)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    originals = dict(named)
    names, first = {}, dict[int, str]()
    for name, tensor in named:
        names[name] = first.setdefault(id(tensor), name)
    real = [t for t in pytree.tree_leaves((call.args, dict(call.kwargs), call.target)) if isinstance(t, Tensor)]
    device = next((t.device for t in real if t.device.type != "meta"), torch.device("cpu"))
    stand_ins = {name: _stand_in(fake_mode, originals[name], device) for name in set(names.values())}
    swapped = {name: stand_ins[canonical] for name, canonical in names.items()}
    places = Places(model)
    permission = Permission(
        on_fakes=fake_mode is not None,
        everywhere=way.guarded,
        fixed=way.fixed or way.guarded,
        places=way.guard_in,
        answers_in=way.answers_in,
        of=places,
    )
    recorder = Recorder({name: stand_ins[name] for name in dict.fromkeys(names.values())}, permission)
    calls = ModuleCalls(recorder, model, way.opaque, originals, fake_mode)
    modules: dict[str, nn.Module] = {}
    (args, kwargs), target, inputs = _inputs(recorder, fake_mode, call)
    if fake_mode is not None:
        recorder.evaluate_with(_evaluator(recorder, real, originals, fake_mode))
    with contextlib.ExitStack() as stack:
        changed = stack.enter_context(_restored_attributes(model, start))
        stack.enter_context(compiling_flag(way.compiling))
        stack.enter_context(eager_stance())
        if fake_mode is not None:
            stack.enter_context(fake_mode)
        stack.enter_context(swap_parameters(model, swapped))
        stack.enter_context(calls.recording())
        modules |= stack.enter_context(calls.whole_methods(model))
        try:
            with recorder:
                output = model(*args, **kwargs)
                _copy_back_buffers(model, swapped)
                leaves, out_spec = flatten_output(output)
                loss = find_loss(output, leaves)
                if call.loss_fn is not None:
                    modules[LOSS_MODULE] = LossModule(call.loss_fn, out_spec, pytree.tree_structure(target))
                    leaves.append(
                        _record_loss(recorder, modules[LOSS_MODULE], leaves, pytree.tree_leaves(target), fake_mode)
                    )
                    loss = len(leaves) - 1
                results = [recorder.node_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        except Exception as cause:
            raise TraceFailure(cause, calls.failed, places.method_in(cause)) from cause
    recorder.graph.output(results)
    tensor_positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    recorder.effects.finish(recorder.graph)
    _mark_effects(recorder.graph, model, way.opaque)
    remove_dead_code(recorder.graph)
    emit_regions(recorder.graph)
    captured = Captured(
        graph_module=graph_module(model, recorder.graph, recorder.constants, modules),
        out_spec=out_spec,
        out_constants={i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)},
        loss=None if loss is None else tensor_positions.index(loss),
        names=names,
        route=way.name,
        **inputs,
    )
    return captured, changed


def _evaluator(
    recorder: Recorder, real: list[Tensor], originals: Mapping[str, Tensor], fake_mode: FakeTensorMode
) -> Evaluator:
    names = [n.name for n in recorder.graph.nodes if n.op == "placeholder"]
    buffers = {n: t for n, t in originals.items() if not isinstance(t, nn.Parameter) and t.device.type != "meta"}
    return Evaluator(dict(zip(names, real, strict=False)), buffers, recorder.constants, Untraceable, fake_mode)


def _stand_in(fake_mode: FakeTensorMode | None, tensor: Tensor, device: torch.device) -> Tensor:
    """The fake twin of a tensor; of one on the meta device, a twin on the device of the micro-batch."""
    if fake_mode is None:
        return tensor
    if tensor.device.type != "meta":
        return fake_mode.from_tensor(tensor, static_shapes=True)
    with fake_mode:
        twin: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(twin, requires_grad=tensor.requires_grad)
        return twin.requires_grad_(tensor.requires_grad)


def _inputs(recorder: Recorder, fake_mode: FakeTensorMode | None, call: Call) -> tuple[Any, Any, dict[str, Any]]:
    """Placeholders for the tensors of the call. Returns (args, kwargs) and target as the recorded call sees them, and
    fields of Captured."""
    given: tuple[Any, ...] = (call.args, dict(call.kwargs))
    if call.loss_fn is not None:
        given = (*given, call.target)
    paths, spec = pytree.tree_flatten_with_path(given)
    values, constants, input_names = [], {}, []
    for i, (path, leaf) in enumerate(paths):
        input_names.append(_input_name(path))
        if not isinstance(leaf, Tensor):
            constants[i] = leaf
            values.append(leaf)
            continue
        value: Tensor
        if fake_mode is not None:
            value = fake_mode.from_tensor(leaf, static_shapes=True)
        else:
            value = leaf.detach().clone().requires_grad_(leaf.requires_grad)
        recorder.placeholder(f"input_{i}", value)
        values.append(value)
    rebuilt = pytree.tree_unflatten(values, spec)
    in_spec = pytree.tree_structure((call.args, dict(call.kwargs)))
    fields = {"in_spec": in_spec, "constants": constants, "input_names": tuple(input_names)}
    return rebuilt[:2], rebuilt[2] if len(rebuilt) > 2 else None, fields


def _input_name(path: tuple[Any, ...]) -> str:
    head, rest = path[0].idx, path[1:]
    if head == 2:
        return "target" + "".join(map(str, rest))
    if head == 0:
        return "args" + "".join(map(str, rest))
    return str(getattr(rest[0], "key", rest[0])) + "".join(map(str, rest[1:]))


@dataclass(frozen=True, slots=True)
class Unseen:
    """Stands in an output for an object whose tensors a graph cannot see, such as a key-value cache."""

    type_name: str


def flatten_output(output: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The output's leaves; dataclasses that nobody registered become pytree nodes."""
    leaves, spec = pytree.tree_flatten(output)
    unknown = [x for x in leaves if hasattr(type(x), "__dataclass_fields__")]
    if unknown:
        for value in unknown:
            register_dataclass(type(value))
        return flatten_output(output)
    plain = (Tensor, int, float, complex, bool, str, bytes, torch.dtype, torch.device, type(None))
    return [leaf if isinstance(leaf, plain) else Unseen(type(leaf).__name__) for leaf in leaves], spec


def _record_loss(
    recorder: Recorder, module: nn.Module, outputs: list[Any], targets: list[Any], fake_mode: FakeTensorMode | None
) -> Tensor:
    def run() -> Any:
        try:
            return module(outputs, targets)
        except (
            torch._subclasses.fake_tensor.DataDependentOutputException,
            torch._subclasses.fake_tensor.DynamicOutputShapeException,
        ):
            assert fake_mode is not None
            # The function reads values: it is run on made-up tensors, only to learn that it gives a scalar.
            return real_like(lambda a, k: module(*a, **k), (outputs, targets), {}, fake_mode)

    loss: Tensor = recorder.record("call_module", LOSS_MODULE, (outputs, targets), {}, run)
    return loss


def _copy_back_buffers(model: nn.Module, swapped: Mapping[str, Tensor]) -> None:
    """A buffer that forward assigned anew becomes a copy into the buffer that there was."""
    for name, buffer in model.named_buffers(remove_duplicate=False):
        old = swapped.get(name)
        if old is None or buffer is old:
            continue
        if buffer.shape != old.shape:
            raise Untraceable(
                f"buffer {name!r} replaced by one of another shape ({tuple(old.shape)} by {tuple(buffer.shape)})"
            )
        with torch.no_grad():
            old.copy_(buffer)


@contextlib.contextmanager
def _restored_attributes(model: nn.Module, start: State) -> Iterator[State]:
    """Puts back what forward assigned to attributes of modules, so that no fake tensor stays in the model.

    Gives the attributes of plain values that forward changed, when the context has ended.
    """
    before = [(name, m, dict(m.__dict__)) for name, m in model.named_modules() if not is_scripted(m)]
    containers = list(_containers(model))
    changed: State = {}
    for name, module, _ in before:
        module.__dict__.update({attribute: value for (owner, attribute), value in start.items() if owner == name})
    try:
        yield changed
    finally:
        for name, module, attributes in before:
            for key, value in list(module.__dict__.items()):
                if key not in attributes:
                    del module.__dict__[key]
                elif isinstance(value, (int, float, str, bool)) and value != attributes[key]:
                    changed[name, key] = value
            module.__dict__.update(attributes)
        for container, content in containers:
            _refill(container, content)


def _containers(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """The lists, dicts and sets that modules and their hooks hold, each with a copy: forward may fill them."""
    for module in model.modules():
        held = [v for k, v in module.__dict__.items() if k not in _OWN_OF_TORCH]
        for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]:
            held += [cell.cell_contents for cell in getattr(hook, "__closure__", None) or () if _is_filled(cell)]
        for value in held:
            if type(value) in (list, dict, set, collections.deque, collections.OrderedDict, collections.defaultdict):
                yield value, value.copy()


_OWN_OF_TORCH = set(nn.Module().__dict__)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that has no value yet
        return False


def _refill(container: Any, content: Any) -> None:
    if (
        len(container) != len(content)
        or any(a is not b for a, b in zip(container, content, strict=True))
        or (isinstance(content, dict) and any(container[k] is not v for k, v in content.items()))
    ):
        container.clear()
        (container.update if isinstance(content, (dict, set)) else container.extend)(content)


def _mark_effects(graph: fx.Graph, model: nn.Module, opaque: frozenset[str]) -> None:
    """Marks nodes that do something beside returning a value, so that they stay though nobody reads it."""
    for node in graph.nodes:
        own_code = (
            node.op == "call_module"
            and node.target != LOSS_MODULE
            and (is_method(node.target) or node.target in opaque or has_hooks(model.get_submodule(str(node.target))))
        )
        if node.meta.get("writes") or node.meta.get("random") or node.target in GUARDS or own_code:
            node.meta["effect"] = True


def graph_module(
    model: nn.Module, graph: fx.Graph, constants: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> fx.GraphModule:
    """A GraphModule over the model's own submodules, parameters and buffers; constants become buffers outside its state
    dict."""
    tensors = (
        dict(model.named_parameters(remove_duplicate=False))
        | dict(model.named_buffers(remove_duplicate=False))
        | dict(constants)
    )
    root: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            root[node.target] = tensors[node.target]
        elif node.op == "call_module":
            root[node.target] = modules.get(node.target) or model.get_submodule(node.target)
    result = fx.GraphModule(root, graph, type(model).__name__)
    result.training = model.training
    persistent = set(model.state_dict(keep_vars=True))
    for name in root:
        if isinstance(root[name], Tensor) and not isinstance(root[name], nn.Parameter) and name not in persistent:
            parent, _, field = name.rpartition(".")
            result.get_submodule(parent)._non_persistent_buffers_set.add(field)
    return result
