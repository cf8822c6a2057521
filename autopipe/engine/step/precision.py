"""The context under which stages compute, by the run's precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from autopipe.config import PipelineConfig


def precision_context(config: PipelineConfig, device: torch.device) -> Callable[[], Any]:
    """Makes the context under which stages run."""
    dtype = {"bf16": torch.bfloat16, "bf16-params": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    if dtype is None:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)
