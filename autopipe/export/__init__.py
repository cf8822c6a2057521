"""Plans in the formats of other frameworks.

A `Plan` becomes text for the target, or a `PlanError` that says what the target cannot express. Read `units.py` first,
and `torch_stages.py` for torch.
"""

from __future__ import annotations

from collections.abc import Callable

from autopipe.errors import ConfigError
from autopipe.export.deepspeed import deepspeed_layers
from autopipe.export.megatron import megatron_layout
from autopipe.export.torch_script import torch_script
from autopipe.export.torch_stages import TorchStage, pipeline_stage, sum_tied_gradients, torch_stages
from autopipe.export.torchtitan import torchtitan_modules
from autopipe.plan import Plan

__all__ = [
    "TARGETS",
    "TorchStage",
    "deepspeed_layers",
    "export",
    "megatron_layout",
    "pipeline_stage",
    "sum_tied_gradients",
    "torch_script",
    "torch_stages",
    "torchtitan_modules",
]

_FROM_PLAN: dict[str, Callable[[Plan], str]] = {
    "torchtitan": torchtitan_modules,
    "deepspeed": deepspeed_layers,
    "megatron": megatron_layout,
}
TARGETS = ("torch", *_FROM_PLAN)


def export(plan: Plan, target: str, model: str | None = None) -> str:
    """Return the text for a target: `torch` (a program), `torchtitan`, `deepspeed`, `megatron`.

    Args:
        model: for `torch`, the model that was planned, as the command line names it (`file.py:factory`).

    Raises:
        ConfigError: an unknown target, or no model for `torch`.
        PlanError: the target cannot express the plan.
    """
    if target == "torch":
        return torch_script(plan, model)
    if target not in _FROM_PLAN:
        raise ConfigError(
            f"target {target!r}", expected=f"one of {', '.join(TARGETS)}", where="export", remedy="use one of these"
        )
    return _FROM_PLAN[target](plan)
