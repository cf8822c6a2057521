"""bf16 parameters with fp32 master copies: the optimizer steps the copies, and the parameters are the copies, rounded.

Gradients are accumulated and reduced in fp32. The method is mixed precision training (Micikevicius et al. 2018),
without a loss scale, which bf16 does not need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_KEPT_WHOLE = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
"""Layers whose parameters keep their dtype, whatever their shape."""

Originals = dict[Tensor, Tensor]
"""The values before rounding, by parameter."""


def lower(model: nn.Module) -> Originals:
    """Round a model's fp32 parameters of two and more dimensions to bf16; `Parameter` objects stay the same.

    Vectors and the parameters of normalisation layers keep their dtype: they are few, and kernels want them in fp32.
    """
    whole = {p for m in model.modules() if isinstance(m, _KEPT_WHOLE) for p in m.parameters(recurse=False)}
    originals: Originals = {}
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 and parameter.dim() > 1 and parameter not in whole:
            originals[parameter] = parameter.data
            parameter.data = parameter.data.to(torch.bfloat16)
        if parameter.dtype == torch.bfloat16:
            parameter.grad_dtype = torch.float32
    return originals


class MasterCopies:
    """The fp32 copies of the bf16 parameters that this rank's optimizer steps.

    Attributes:
        of: the copy of each such parameter, by name.
    """

    def __init__(self) -> None:
        self.of: dict[str, nn.Parameter] = {}

    def add(self, parameters: Mapping[str, nn.Parameter], originals: Originals) -> None:
        """Make copies, of the values before rounding if these are known."""
        for name, parameter in parameters.items():
            if parameter.dtype == torch.bfloat16 and name not in self.of:
                value = originals.get(parameter)
                exact = parameter.detach() if value is None or value.device.type == "meta" else value
                self.of[name] = nn.Parameter(exact.to(parameter.device, torch.float32, copy=True))

    def stepped(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The tensor that the optimizer steps for each parameter."""
        return {n: self.of.get(n, p) for n, p in parameters.items()}

    @contextmanager
    def stepping(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Lend the copies the gradients of their parameters; afterwards round the copies into the parameters."""
        for name, copy in self.of.items():
            copy.grad = parameters[name].grad
        yield
        self.round_back(parameters)

    @torch.no_grad()
    def round_back(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Round the copies into the parameters."""
        for name, copy in self.of.items():
            copy.grad = None
            parameters[name].copy_(copy)
