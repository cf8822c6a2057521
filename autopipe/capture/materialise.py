"""A model on the meta device and the names that a stage holds go in; these parameters and buffers get values, and no others do."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from autopipe.capture.initialise import initialise
from autopipe.errors import CheckpointError

Source = Mapping[str, Tensor] | str | Path


def materialise(
    model: nn.Module,
    names: Collection[str],
    *,
    source: Source | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Gives values to the tensors `names` of a model on the meta device. A `Parameter` stays the same object.

    Args:
        model: some or all of its parameters and buffers are on the meta device; those that are not are left.
        names: parameters and buffers by name, as `autopipe.placement.owners` gives them for a stage.
        source: a state dict, a safetensors file, an index file (`*.safetensors.index.json`) or the folder that holds either.
            Only the tensors named are read. Without it the model initialises itself, by its modules' `reset_parameters`.
        seed: of the initialisation, which depends on it and on the names of parameters, not on the number of stages.

    Raises:
        CheckpointError: the source lacks a tensor or holds it in another shape.
        ConfigError: no code of the model gives a value to a parameter or buffer.
    """
    everything = _tensors(model)
    wanted = {n: everything[n] for n in names if everything[n].device.type == "meta"}
    found = _read(source, _aliases(model, wanted)) if source is not None else {}
    persistent = set(model.state_dict(keep_vars=True))
    missing = sorted(n for n in wanted if n in persistent and n not in found)
    if source is not None and missing:
        raise CheckpointError(
            f"no tensor {missing[0]!r} ({len(missing)} missing)",
            expected="every parameter and persistent buffer of the stage",
            where=str(source) if isinstance(source, (str, Path)) else "the state dict",
            remedy="give the checkpoint of this model, under the model's own names",
        )
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            raise CheckpointError(
                f"tensor {name!r} of shape {tuple(value.shape)}",
                expected=f"{tuple(wanted[name].shape)}",
                where=str(source) if isinstance(source, (str, Path)) else "the state dict",
                remedy="give the checkpoint of this model, made with the same configuration",
            )
        _become(model, wanted[name], value.to(device=device, dtype=wanted[name].dtype, copy=True))
    rest = [n for n in wanted if n not in found]
    for name in rest:
        _become(model, wanted[name], torch.empty_like(wanted[name], device=device))
    initialise(model, rest, seed)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _aliases(model: nn.Module, wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name of the wanted tensors, to the name asked for: a checkpoint holds a tied parameter under any of them."""
    first = {id(t): n for n, t in wanted.items()}
    return {n: first[id(t)] for n, t in _tensors(model).items() if id(t) in first}


def _become(model: nn.Module, old: Tensor, value: Tensor) -> None:
    """Puts the value in the place of a meta tensor, wherever that is held."""
    if isinstance(old, nn.Parameter):
        torch.utils.swap_tensors(old, nn.Parameter(value.detach(), requires_grad=old.requires_grad))  # type: ignore[no-untyped-call]
    else:
        torch.utils.swap_tensors(old, value.detach())  # type: ignore[no-untyped-call]


def _read(source: Source, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that the source has under any of the names."""
    if isinstance(source, Mapping):
        return {own: source[n] for n, own in names.items() if n in source}
    found: dict[str, Tensor] = {}
    for file, keys in _files(Path(source)):
        found |= dict(_from_file(file, {n: own for n, own in names.items() if keys is None or n in keys}))
    return found


def _files(path: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """The safetensors files of a checkpoint, each with the names it holds, None where these are not listed."""
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        if not indices:
            yield from ((file, None) for file in sorted(path.glob("*.safetensors")))
            return
        path = indices[0]
    if path.suffix != ".json":
        yield path, None
        return
    files: dict[str, set[str]] = {}
    for name, file_name in json.loads(path.read_text())["weight_map"].items():
        files.setdefault(file_name, set()).add(name)
    yield from ((path.parent / file_name, keys) for file_name, keys in files.items())


def _from_file(file: Path, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    if not names:
        return
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        held = set(opened.keys())
        for name, own in names.items():
            if name in held:
                yield own, opened.get_tensor(name)
