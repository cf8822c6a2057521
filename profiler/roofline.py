"""Time of each ATen operator on a device that is not here: the larger of its arithmetic and its memory traffic.

The roofline model (Williams, Waterman and Patterson, "Roofline", CACM 2009), with a share of each peak by operator
class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from profiler.devices import Efficiency, efficiency_of
from profiler.records import DeviceSpec

_aten = torch.ops.aten
_GATHERS = (_aten.embedding, _aten.index_select, _aten.gather, _aten.index, _aten.slice, _aten.select)
"""These read as much of their first argument as they return."""
_forward_attention: Callable[..., int] = flop_counter.sdpa_flop_count
_backward_attention: Callable[..., int] = flop_counter.sdpa_backward_flop_count


class RooflineClock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what the operators in its scope would take; its marks are readings of that sum, as a clock's are.

    Args:
        spec: the device.
    """

    def __init__(self, spec: DeviceSpec) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._spec, self._efficiency = spec, efficiency_of(spec)
        self.total_us = 0.0

    def mark(self) -> float:
        """The time that the operators so far would have taken."""
        return self.total_us

    def elapsed_us(self, start: float, end: float) -> float:
        """Microseconds between two marks."""
        return end - start

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.namespace != "prim" and not _only_looks(func):
            self.total_us += operator_us(func, args, kwargs, output, self._spec, self._efficiency)
        return output


def operator_us(func: Any, args: Any, kwargs: Any, output: Any, spec: DeviceSpec, efficiency: Efficiency) -> float:
    """Time of one operator, in microseconds: at least that of starting it.

    Args:
        func: the operator, an ATen overload.
        args, kwargs: its arguments.
        output: what it returned; only shapes are read.
        spec, efficiency: the device.
    """
    kind, num_flops = _arithmetic(func, args, kwargs, output)
    arithmetic_s = num_flops / (_peak(spec, args, output) * getattr(efficiency, kind)) if num_flops else 0.0
    memory_s = _traffic_bytes(func, args, kwargs, output) / (spec.bytes_per_s * efficiency.memory)
    return max(efficiency.launch_us, max(arithmetic_s, memory_s) * 1e6)


def _only_looks(func: Any) -> bool:
    """Whether the operator returns a view and moves nothing."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _arithmetic(func: Any, args: Any, kwargs: Any, output: Any) -> tuple[str, float]:
    """Operator class and floating-point operations; none for what only moves memory."""
    packet = func.overloadpacket
    name = packet.__name__
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu:
        return "attention", _causal(args, 4) * _forward_attention(args[0].shape, args[1].shape, args[2].shape)
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        shapes = (args[0].shape, args[1].shape, args[2].shape, args[3].shape)
        return "attention", _causal(args, 7) * _backward_attention(*shapes)
    count: Callable[..., Any] | None = flop_counter.flop_registry.get(packet)
    if count is None:
        return "memory", 0.0
    kind = "attention" if "attention" in name else "convolution" if "conv" in name else "matmul"
    return kind, float(count(*args, **kwargs, out_val=output))


def _causal(args: Any, position: int) -> float:
    """A causal kernel leaves out the upper half of the scores."""
    return 0.5 if len(args) > position and args[position] is True else 1.0


def _peak(spec: DeviceSpec, args: Any, output: Any) -> float:
    """FLOP rate for the dtype of the first floating tensor; that of TF32 where torch may use it for float32."""
    floating = [t for t in pytree.tree_leaves((args, output)) if isinstance(t, Tensor) and t.dtype.is_floating_point]
    name = str(floating[0].dtype).removeprefix("torch.") if floating else "float32"
    if name.startswith("float8"):
        name = "float8"
    if name == "float32" and torch.get_float32_matmul_precision() != "highest":
        name = "tf32"
    lowest = min(spec.flops.values())
    return spec.flops.get(name, spec.flops.get("float32", lowest))


def _traffic_bytes(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    """Bytes read and written: every argument and every output once."""
    written = sum(_num_bytes(t) for t in pytree.tree_leaves(output))
    if func.overloadpacket in _GATHERS:
        return 2 * written
    return written + sum(_num_bytes(t) for t in pytree.tree_leaves((args, kwargs)))


def _num_bytes(leaf: Any) -> int:
    """Bytes of memory behind a tensor's elements: an expanded dimension is read from one place."""
    if not isinstance(leaf, Tensor):
        return 0
    if leaf.layout != torch.strided:
        return leaf.numel() * leaf.element_size()
    count = 1
    for size, stride in zip(leaf.shape, leaf.stride(), strict=True):
        count *= int(size) if stride != 0 or size == 0 else 1
    return count * leaf.element_size()
