"""The parameters and buffers of a graph module: one name for each, its size, and the tensor that nodes are run with."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from profiler.records import ParameterProfile

_WRITING_FUNCTIONS = (
    operator.setitem,
    *(getattr(operator, f"i{n}") for n in ("add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or", "xor")),
)


class ModelTensors:
    """Parameters, buffers and constants of a graph module, as nodes are run with them.

    A parameter on the device is given as a detached alias: nothing that runs reaches its `.grad`. A buffer is copied
    once a run, so that what updates it (batch norm) works on and the model keeps its own. A tensor that is elsewhere
    (another device, `meta`) is made afresh at each request and is the caller's to drop, so that one node's tensors
    exist at a time.

    Args:
        model: the graph module.
        device: where nodes run.
        names: other names of parameters and buffers, each with the one name to report (optional).
        is_fake: never read a value: tensors are made by shape, under the fake mode that holds.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        device: torch.device,
        names: Mapping[str, str] | None = None,
        is_fake: bool = False,
    ) -> None:
        self._model, self._device, self._is_fake = model, device, is_fake
        self._written = _written_attributes(model.graph)
        self._ready: dict[str, Tensor] = {}
        self._tensors: dict[str, Tensor] = {}
        self._name_of: dict[str, str] = {}
        given = names or {}
        for named in (model.named_parameters, model.named_buffers):
            first: dict[int, str] = {}
            for name, tensor in named(remove_duplicate=False):
                canonical = first.setdefault(id(tensor), name)
                canonical = given.get(name, given.get(canonical, canonical))
                self._name_of[name] = canonical
                self._tensors.setdefault(canonical, tensor)

    def reset(self) -> None:
        """Forgets the copies, so that buffers begin again as the model holds them."""
        self._ready.clear()

    def devices(self) -> set[torch.device]:
        """Values of the model's parameters and buffers."""
        return {t.device for t in self._tensors.values()}

    def profiles(self) -> dict[str, ParameterProfile]:
        """Size of each parameter and buffer, by its one name."""
        return {
            name: ParameterProfile(bytes=t.numel() * t.element_size(), trainable=t.requires_grad)
            for name, t in self._tensors.items()
        }

    def name_of(self, target: str) -> str | None:
        """The one name of what a dotted path names; None where it is no parameter or buffer."""
        return self._name_of.get(target)

    def original(self, target: str) -> object:
        """The object that a dotted path names in the model."""
        owner, _, leaf = target.rpartition(".")
        return getattr(self._model.get_submodule(owner), leaf)

    def bytes_of(self, name: str) -> int:
        """Size of a parameter or buffer, by its one name."""
        tensor = self._tensors[name]
        return tensor.numel() * tensor.element_size()

    def own(self, node: fx.Node) -> list[str]:
        """Dotted paths of the parameters and buffers of the submodules that a node calls or is given, each once."""
        targets = [str(node.target)] if node.op == "call_module" else []
        targets += [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        paths: dict[str, None] = {}
        for target in targets:
            module = self.original(target)
            if isinstance(module, nn.Module):
                for named in (module.named_parameters, module.named_buffers):
                    paths |= dict.fromkeys(f"{target}.{name}" for name, _ in named(remove_duplicate=False))
        return list(paths)

    def is_resident(self, target: str) -> bool:
        """Whether the tensor is on the device already."""
        tensor = self.original(target)
        if self._is_fake:
            return True
        return isinstance(tensor, Tensor) and has_values(tensor) and _same_device(tensor.device, self._device)

    def get(self, target: str) -> Tensor:
        """The tensor to run with: a leaf on the device that requires grad as the model's own does."""
        key = self._name_of.get(target, target)
        if key in self._ready:
            return self._ready[key]
        tensor = self.original(target)
        assert isinstance(tensor, Tensor)
        if self._is_fake:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device)
        else:
            made = on_device(tensor, self._device)
        if not self._is_fake and (not isinstance(tensor, nn.Parameter) or target in self._written):
            made = made.clone() if has_values(tensor) and made.data_ptr() == tensor.data_ptr() else made
        made = made.requires_grad_(tensor.requires_grad) if tensor.is_leaf else made
        if self.is_resident(target):
            self._ready[key] = made
        return made


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A detached tensor on the device: the same memory where it is there already, else a copy; random values for `meta`
    and fake tensors.

    Integers without values become zeros, which are valid indices; booleans become true, which masks nothing.
    """
    if has_values(tensor):
        return tensor.detach().to(device)
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return fill_random(made)


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor holds data, as those on `meta` and fake ones do not."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def fill_random(tensor: Tensor) -> Tensor:
    """Writes ordinary values into a tensor, in place: denormal or infinite leftovers of memory would be timed as
    such."""
    with torch.no_grad():
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return tensor.uniform_(-0.05, 0.05) if not tensor.dtype.is_complex else tensor.normal_()
        return tensor.fill_(tensor.dtype == torch.bool)


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index or 0) == (b.index or 0)


def _written_attributes(graph: fx.Graph) -> set[str]:
    """Targets of `get_attr` nodes that may be written to, directly or through a chain of views."""
    written = set()
    for node in graph.nodes:
        source = node.args[0] if may_write(node) and node.args else None
        while isinstance(source, fx.Node) and source.op in ("call_function", "call_method") and source.args:
            source = source.args[0]
        if isinstance(source, fx.Node) and source.op == "get_attr":
            written.add(str(source.target))
    return written


def may_write(node: fx.Node) -> bool:
    """Whether a node looks as if it writes to its first argument, going by torch's naming (`add_`, `setitem`,
    `out=`)."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    base = name.split(".")[0]
    return (
        node.target in _WRITING_FUNCTIONS
        or "out" in node.kwargs
        or (base.endswith("_") and not base.endswith("__"))
        or base in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
    )
