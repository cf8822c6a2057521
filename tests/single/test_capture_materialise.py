"""Models on the meta device: one stage's tensors get values, from a state dict by name or by the model's own
initialisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.capture.materialise import materialise
from autopipe.checkpoint import open_weights
from autopipe.errors import CheckpointError, ConfigError
from autopipe.placement import owners, with_unread
from scenarios.pipelines import make


def on_meta(name: str) -> tuple[nn.Module, Any]:
    with torch.device("meta"):
        model = make(name, 2)[0]
    return model, make(name, 2)[1:3]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def test_the_initialisation_does_not_depend_on_the_number_of_stages() -> None:
    whole, _ = on_meta("resnet")
    materialise(whole, list(tensors(whole)), seed=3)
    halves, (args, kwargs) = on_meta("resnet")
    captured = autopipe.capture(halves, args, kwargs)
    stage_of = {n.name: int(i > len(captured.nodes) // 2) for i, n in enumerate(captured.nodes)}
    placed = with_unread(halves, owners(captured, stage_of), captured.names)
    for stage in (1, 0):
        materialise(halves, [n for n, stages in placed.items() if stage in stages], seed=3)
        assert stage == 0 or any(p.device.type == "meta" for p in halves.parameters())
    for name, value in tensors(whole).items():
        assert torch.equal(value, tensors(halves)[name]), name
    other, _ = on_meta("resnet")
    materialise(other, list(tensors(other)), seed=4)
    assert not torch.equal(other.head.weight, whole.head.weight)  # type: ignore[union-attr, arg-type]


def test_parameters_stay_the_same_objects_and_the_graph_computes_with_them() -> None:
    plain, args, kwargs, _, _ = make("gpt", 2)
    model, _ = on_meta("gpt")
    captured = autopipe.capture(model, args, kwargs)
    before = dict(model.named_parameters())
    materialise(model, list(dict.fromkeys(captured.names.values())), source=plain.state_dict())
    assert all(p is before[n] for n, p in model.named_parameters())
    assert model.head.weight is model.wte.weight  # type: ignore[union-attr]
    assert torch.equal(captured(*args, **kwargs), plain(*args, **kwargs))


@pytest.mark.parametrize("sharded", [False, True])
def test_only_the_named_tensors_are_read_from_safetensors(tmp_path: Path, sharded: bool) -> None:
    from safetensors.torch import save_file

    plain = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    state = plain.state_dict()
    if sharded:
        save_file({n: t for n, t in state.items() if n < "1.w"}, tmp_path / "a.safetensors")
        save_file({n: t for n, t in state.items() if n >= "1.w"}, tmp_path / "b.safetensors")
        index = {"weight_map": {n: ("a" if n < "1.w" else "b") + ".safetensors" for n in state}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(state, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    materialise(model, [n for n in state if n[0] == "1"], source=open_weights(tmp_path))
    for name, value in tensors(model).items():
        assert (value.device.type == "meta") == (name[0] != "1")
        assert name[0] != "1" or torch.equal(value, state[name])


def test_a_checkpoint_that_lacks_a_tensor_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="no tensor 'bias'"):
        materialise(model, ["weight", "bias"], source={"weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"of shape \(3, 2\)"):
        materialise(model, ["weight"], source={"weight": torch.ones(3, 2)})


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))


def test_a_parameter_that_nothing_initialises_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Bare())
    with pytest.raises(ConfigError, match=r"'0\.scale'.*Bare.*reset_parameters"):
        materialise(model, ["0.scale"])


def test_a_model_of_transformers_initialises_itself() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=30,
    )
    with torch.device("meta"):
        whole, part = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    materialise(whole, list(tensors(whole)), seed=1)
    mine = [n for n in tensors(part) if "layers.1" in n or "norm" in n or "rotary" in n]
    materialise(part, mine, seed=1)
    assert all(torch.equal(tensors(part)[n], tensors(whole)[n]) for n in mine)
    assert all(torch.isfinite(t).all() for t in tensors(whole).values())
