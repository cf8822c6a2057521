"""A model on the meta device and the names that a stage holds go in; these parameters and buffers get values, and no
others do."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from autopipe.capture.initialise import initialise
from autopipe.errors import CheckpointError


def materialise(
    model: nn.Module,
    names: Collection[str],
    *,
    source: Mapping[str, Tensor] | None = None,
    later: Collection[str] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
    exact: dict[Tensor, Tensor] | None = None,
) -> None:
    """Gives values to the tensors `names` of a model on the meta device. A `Parameter` stays the same object.

    Args:
        model: some or all of its parameters and buffers are on the meta device; those that are not are left.
        names: parameters and buffers by name, as `autopipe.placement.owners` gives them for a stage.
        source: a state dict, or a mapping that reads a tensor when it is asked for
            (`autopipe.checkpoint.open_weights`). Only the tensors named are taken. Without it the model initialises
            itself, by its modules' `reset_parameters`.
        later: tensors that the caller fills: they get memory, and no values.
        exact: gets the values of those that the source has in another dtype, as they are there.
        seed: of the initialisation, which depends on it and on the names of parameters, not on the number of stages.

    Raises:
        CheckpointError: the source lacks a tensor or holds it in another shape.
        ConfigError: no code of the model gives a value to a parameter or buffer.
    """
    everything = tensors_by_name(model)
    wanted = {n: everything[n] for n in names if everything[n].device.type == "meta"}
    found = {} if source is None else names_in(source, model, [n for n in wanted if n not in later])
    for name, theirs in found.items():
        assert source is not None
        value = source[theirs]
        require_shape(name, value, wanted[name])
        copy = isinstance(source, dict)  # its tensors stay the caller's
        if exact is not None and value.dtype != wanted[name].dtype:
            exact[wanted[name]] = value
        _become(wanted[name], value.to(device=device, dtype=wanted[name].dtype, copy=copy))
    rest = [n for n in wanted if n not in found]
    for name in rest:
        _become(wanted[name], torch.empty_like(wanted[name], device=device))
    initialise(model, [n for n in rest if n not in later], seed)


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def names_in(source: Mapping[str, Tensor], model: nn.Module, wanted: Collection[str]) -> dict[str, str]:
    """For each wanted tensor, the name under which the source has it: a tied parameter may be there under any of its
    names.

    Raises:
        CheckpointError: a parameter or a buffer of the state dict is not there.
    """
    everything = tensors_by_name(model)
    first = {id(everything[n]): n for n in wanted}
    found: dict[str, str] = {}
    for alias, tensor in everything.items():
        if id(tensor) in first and alias in source:
            found.setdefault(first[id(tensor)], alias)
    persistent = set(model.state_dict(keep_vars=True))
    missing = sorted(n for n in wanted if n in persistent and n not in found)
    if missing:
        raise CheckpointError(
            f"no tensor {missing[0]!r} ({len(missing)} missing)",
            expected="every parameter and persistent buffer of the model",
            where=str(getattr(source, "where", "the state dict")),
            remedy="give the weights of this model, under the model's own names",
        )
    return found


def require_shape(name: str, value: Tensor, wanted: Tensor) -> None:
    """Raises a CheckpointError where a tensor has another shape than the model's."""
    if value.shape != wanted.shape:
        raise CheckpointError(
            f"tensor {name!r} of shape {tuple(value.shape)}",
            expected=f"{tuple(wanted.shape)}",
            where="the weights",
            remedy="give the weights of this model, made with the same configuration",
        )


def _become(old: Tensor, value: Tensor) -> None:
    """Puts the value in the place of a tensor, wherever that is held."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(value.detach(), requires_grad=old.requires_grad)
        if getattr(old, "grad_dtype", None) not in (None, new.dtype):
            new.grad_dtype = old.grad_dtype
        torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]
    else:
        torch.utils.swap_tensors(old, value.detach())  # type: ignore[no-untyped-call]
