"""A checkpoint becomes weights that the plain model loads; weights become a checkpoint. One tensor is in memory at a
time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from autopipe.checkpoint.deepspeed import layers_folder, open_deepspeed
from autopipe.checkpoint.faults import named
from autopipe.checkpoint.folders import published
from autopipe.checkpoint.readers import SAFETENSORS, TORCH, Stored
from autopipe.checkpoint.tensors import MODEL
from autopipe.checkpoint.weights import Weights, is_checkpoint, open_weights
from autopipe.checkpoint.writers import write_safetensors, write_sharded, write_torch
from autopipe.checkpoint.writing import write
from autopipe.errors import CheckpointError, ConfigError

Target = Literal["safetensors", "torch", "checkpoint"]
TARGETS: tuple[Target, ...] = ("safetensors", "torch", "checkpoint")
MAX_SHARD_BYTES = 5 * 10**9
"""As in transformers."""


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Target | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    names: str | Path | None = None,
) -> list[Path]:
    """Writes the model's tensors of `source` as `out`.

    Args:
        source: a checkpoint; weights, as `open_weights` takes them; or, with `names`, a pipeline checkpoint of
            DeepSpeed.
        out: `*.safetensors` or `*.pt`: one file; otherwise a folder: of safetensors for a checkpoint, of a checkpoint
            for weights.
        to: what to write, where the name of `out` does not say it.
        max_shard_bytes: in a folder, the size from which a new safetensors file is begun.
        names: a JSON file of DeepSpeed's layers and their names in the model.

    Returns:
        What was written.

    Raises:
        CheckpointError: the source cannot be read, or `out` is there already or cannot be written.
        ConfigError: the arguments do not belong together.
    """
    source, out = Path(source), Path(out)
    target = to or _target(source, out)
    weights = _open(source, Path(names) if names is not None else None)
    if target == "checkpoint":
        return [_write_checkpoint(out, weights)]
    if target == "torch":
        write_torch(out, weights.stored)
        return [out]
    if out.suffix in SAFETENSORS:
        write_safetensors(out, weights.stored)
        return [out]
    return write_sharded(out, weights.stored, max_shard_bytes)


def _target(source: Path, out: Path) -> Target:
    if out.suffix in SAFETENSORS:
        return "safetensors"
    if out.suffix in TORCH:
        return "torch"
    return "safetensors" if is_checkpoint(source) else "checkpoint"


def _open(source: Path, names: Path | None) -> Weights:
    layers = named(lambda: layers_folder(source), source)
    if layers is not None and names is not None:
        return open_deepspeed(layers, names)
    if layers is not None or names is not None:
        raise ConfigError(
            "layers of DeepSpeed without names" if layers else "names for something else than layers of DeepSpeed",
            expected="both, or neither",
            where=str(source),
            remedy="pass --names FILE, a JSON object of layer numbers and module names"
            if layers
            else "leave --names out, or pass the folder that holds layer_…-model_states.pt",
        )
    return open_weights(source)


def _write_checkpoint(out: Path, weights: Weights) -> Path:
    """A checkpoint of step 0 with the model's tensors and nothing else."""
    if published(out, 0).exists():
        raise CheckpointError(
            f"{str(published(out, 0))!r}, which is there already",
            expected="a new checkpoint",
            where=str(out),
            remedy="name another folder",
        )
    first: dict[Stored, str] = {}
    names = {name: first.setdefault(tensor, name) for name, tensor in weights.stored.items()}
    tensors: Mapping[str, Stored] = {MODEL + name: tensor for tensor, name in first.items()}
    meta = {
        "plan": None,
        "names": names,
        "options": {},
        "lr_scheduler": None,
        "loss_scale": None,
        "seed": None,
        "client_state": {"steps": 0, "client": None},
    }
    return write(out, 0, tensors, meta)
