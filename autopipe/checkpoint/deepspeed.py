"""A pipeline checkpoint of DeepSpeed and a map of names go in; its tensors come out under the names of a model.

DeepSpeed's `PipelineModule` saves the state dict of layer 7 as `layer_07-model_00-model_states.pt`, or
`layer_07-model_states.pt`, in a folder for each step. Its keys know the number of a layer and the names within it, not
the model's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from autopipe.checkpoint.faults import named
from autopipe.checkpoint.readers import Stored, tensors_of
from autopipe.checkpoint.weights import Weights
from autopipe.errors import CheckpointError

_LAYER = re.compile(r"layer_(\d{2,9})(?:-model_(\d{2,9}))?-model_states\.pt")


def layers_folder(path: Path) -> Path | None:
    """The folder with the layers of a pipeline checkpoint: the path, or the step in it that its file `latest` names;
    None: there is none."""
    latest = path / "latest"
    step = latest.read_text().strip() if latest.is_file() else ""
    for folder in (path, path / Path(step).name):
        if folder.is_dir() and any(_LAYER.fullmatch(p.name) for p in folder.iterdir()):
            return folder
    return None


def open_deepspeed(folder: Path, names: Path) -> Weights:
    """The weights of a DeepSpeed pipeline checkpoint, by the names of a model.

    Args:
        folder: the one with the layers, such as `global_step100`.
        names: JSON: for each layer the module that it is in the model (`{"1": "blocks.0"}`; "" for the model itself),
            or for single tensors their names (`{"0.weight": "wte.weight"}`), which go first. null leaves a layer or
            tensor out.

    Raises:
        CheckpointError: a layer has no name, two tensors get the same, or a layer is split over several model-parallel
            ranks.
    """
    given: Any = named(lambda: json.loads(names.read_text()), names, "give a JSON object of layers and module names")
    if not isinstance(given, dict) or not all(isinstance(v, (str, type(None))) for v in given.values()):
        raise CheckpointError(
            f"a {type(given).__name__}",
            expected='an object such as {"1": "blocks.0"}',
            where=str(names),
            remedy="map each layer's number to a module of the model, or to null",
        )
    tensors: dict[str, Stored] = {}
    for layer, file in _layers(folder):
        for name, tensor in tensors_of(file).items():
            model_name = _name(layer, name, given, file)
            if model_name is None:
                continue
            if model_name in tensors:
                raise CheckpointError(
                    f"two tensors for {model_name!r}, the second {name!r}",
                    expected="one tensor for each name",
                    where=str(file),
                    remedy="map one of them to null; tied layers hold the same values",
                )
            tensors[model_name] = tensor
    return Weights(tensors, folder)


def _layers(folder: Path) -> list[tuple[int, Path]]:
    """The files of the layers, by number."""
    found: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        match = _LAYER.fullmatch(file.name)
        if not match:
            continue
        if int(match[1]) in found or int(match[2] or 0) > 0:
            raise CheckpointError(
                f"layer {int(match[1])} in several files",
                expected="checkpoints without tensor parallelism",
                where=str(folder),
                remedy="merge the model-parallel ranks with DeepSpeed's own tools first",
            )
        found[int(match[1])] = file
    return sorted(found.items())


def _name(layer: int, name: str, given: dict[str, str | None], file: Path) -> str | None:
    for key in (f"{layer}.{name}", f"{layer:02d}.{name}"):
        if key in given:
            return given[key]
    for key in (str(layer), f"{layer:02d}"):
        if key in given:
            module = given[key]
            return None if module is None else f"{module}.{name}" if module else name
    raise CheckpointError(
        f"layer {layer}, which has no name",
        expected="a module for each layer, or null",
        where=str(file),
        remedy=f"add a line such as {json.dumps(str(layer))}: {json.dumps('blocks.0')} to the names",
    )
