"""Grad mode and autocast as state of each node: read while recording, written back into a graph as enter and exit
nodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.amp import autocast_mode

from profiler import accelerator

_ENTER, _EXIT = autocast_mode._enter_autocast, autocast_mode._exit_autocast


@dataclass(frozen=True, slots=True)
class Region:
    """The modes under which a node ran, as far as they differ from those around the whole graph.

    Attributes:
        grad: false inside `torch.no_grad()`.
        autocast: (device type, dtype, enabled) for each device type whose autocast state was changed.
    """

    grad: bool = True
    autocast: tuple[tuple[str, torch.dtype, bool], ...] = ()


PLAIN = Region()


def _autocast_state() -> dict[str, tuple[torch.dtype, bool]]:
    return {d: (torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in accelerator.autocast_types()}


class RegionReader:
    """Reads the region of the code that runs now, relative to the modes at its creation."""

    def __init__(self) -> None:
        self._ambient = _autocast_state()
        self._ambient_grad = torch.is_grad_enabled()

    def read(self) -> Region:
        grad = (torch.is_grad_enabled() and not torch.is_inference_mode_enabled()) or not self._ambient_grad
        changed = []
        for device, (dtype, enabled) in _autocast_state().items():
            before = self._ambient[device]
            if enabled != before[1] or (enabled and dtype != before[0]):
                changed.append((device, dtype, enabled))
        return Region(grad, tuple(changed)) if changed or not grad else PLAIN


def region_of(node: fx.Node) -> Region:
    """The region that a recorded node belongs to."""
    region: Region = node.meta.get("region", PLAIN)
    return region


def emit_regions(graph: fx.Graph) -> None:
    """Inserts the nodes that switch modes wherever the region of consecutive nodes differs. `graph` must hold none
    yet."""
    current, entered = PLAIN, list[fx.Node]()

    def switch(to: Region, before: fx.Node) -> None:
        nonlocal current
        with graph.inserting_before(before):
            if to.autocast != current.autocast:
                for node in reversed(entered):
                    graph.call_function(_EXIT, (node,))
                entered.clear()
                for device, dtype, enabled in to.autocast:
                    entered.append(graph.call_function(_ENTER, (device, dtype, enabled, True)))
            if to.grad != current.grad:
                graph.call_function(torch._C._set_grad_enabled, (to.grad,))
        current = to

    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr"):
            continue
        region = PLAIN if node.op == "output" else region_of(node)
        if region != current:
            switch(region, node)
