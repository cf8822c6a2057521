"""Places a planned model: parameters of this rank's stages get values on its device, the others are let go."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from autopipe.capture import Captured
from autopipe.capture.compat import is_scripted
from autopipe.capture.materialise import materialise, names_in, require_shape, tensors_by_name
from autopipe.errors import EngineError

_log = logging.getLogger("autopipe.engine")


def place(
    model: nn.Module,
    mine: Collection[str],
    *,
    weights: Mapping[str, Tensor] | None,
    later: bool,
    seed: int,
    device: torch.device,
    exact: dict[Tensor, Tensor],
) -> None:
    """Give values to this rank's parameters and buffers, on its device. A `Parameter` stays the same object.

    Args:
        mine: their first names; tensors of other ranks are not touched, and not read.
        weights: the whole model's weights; None: the model's own code initialises tensors on the meta device.
        exact: gets the weights as they were read, by parameter, for those that another dtype may have rounded.
        later: a checkpoint is loaded afterwards, so tensors of the state dict get memory only.

    Raises:
        CheckpointError: the weights lack a tensor, or hold it in another shape.
        ConfigError: no code of the model gives a value to a parameter or buffer.
        EngineError: an earlier engine has moved a parameter to another rank.
    """
    everything = tensors_by_name(model)
    persistent = set(model.state_dict(keep_vars=True))
    with_values = [n for n in mine if everything[n].device.type != "meta"]
    if weights is not None and not later:
        _copy(model, weights, [n for n in with_values if n in persistent], exact)
    elif not later:
        _refuse_released(everything, mine)
    materialise(
        model,
        mine,
        source=None if later else weights,
        later=persistent if later else (),
        seed=seed,
        device=device,
        exact=exact,
    )
    for name, tensor in everything.items():
        here = name in with_values or not isinstance(
            tensor, nn.Parameter
        )  # later captures read the buffers of all stages
        if here and tensor.device not in (device, torch.device("meta")):
            tensor.data = tensor.data.to(device)


def _copy(model: nn.Module, weights: Mapping[str, Tensor], names: Collection[str], exact: dict[Tensor, Tensor]) -> None:
    """Copy weights into parameters that have values."""
    everything = tensors_by_name(model)
    for name, theirs in names_in(weights, model, names).items():
        value = weights[theirs]
        require_shape(name, value, everything[name])
        everything[name].detach().copy_(value)
        if value.dtype != everything[name].dtype or everything[name] in exact:
            exact[everything[name]] = value


def release(model: nn.Module, captured: Captured, mine: Collection[str]) -> None:
    """Replace the parameters of other ranks, in the model and in its graph, with twins on the meta device.

    Buffers stay: Python may read them when the model is captured for another kind of call. Everything stays if capture
    itself needs values.
    """
    if not captured.route.startswith("recorded"):
        _log.info("the whole model stays on every rank: its graph was captured by its values (%s)", captured.route)
        return
    ours = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if captured.names[n] in set(mine)}
    twins: dict[int, nn.Parameter] = {}
    for module in dict.fromkeys([*model.modules(), *captured.graph_module.modules()]):
        for name, parameter in [] if is_scripted(module) else list(module._parameters.items()):
            if parameter is not None and id(parameter) not in ours and parameter.device.type != "meta":
                setattr(
                    module, name, twins.setdefault(id(parameter), _twin(parameter))
                )  # recurrent layers keep a list too


def _twin(parameter: nn.Parameter) -> nn.Parameter:
    twin = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
    twin.is_on_another_rank = True  # type: ignore[attr-defined]
    return twin


def _refuse_released(everything: Mapping[str, Tensor], mine: Collection[str]) -> None:
    """Raise if an earlier engine left one of these parameters to another rank: its values are gone."""
    for name in mine:
        if getattr(everything[name], "is_on_another_rank", False):
            raise EngineError(
                f"parameter {name!r} without its values, which an earlier engine has left to another rank",
                expected="a model of this engine's own",
                where="model",
                remedy="make the model again, or pass weights= or load a checkpoint",
            )
