"""A checkpoint becomes weights that the plain model and transformers load, and weights become a checkpoint, tensor by
tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autopipe
from autopipe.checkpoint import Reader, convert, newest, open_weights
from autopipe.cli import main
from scenarios.pipelines import TiedGPT, make

ADAM = partial(torch.optim.AdamW, lr=1e-2)


def engine(model: nn.Module, **options: Any) -> Any:
    _, args, _, target, loss_fn = make("gpt", 4)
    return autopipe.pipeline(model, args, example_target=target, loss_fn=loss_fn, optimizer=ADAM, **options)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[TiedGPT, Path]:
    """A model after a step, and its checkpoint."""
    model, args, _, target, _ = make("gpt", 4)
    run = engine(model)
    run.train_batch(*args, target=target)
    run.save_checkpoint(tmp_path / "run")
    return model, tmp_path / "run"  # type: ignore[return-value]


def assert_loads(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    other = TiedGPT()
    other.load_state_dict(state, strict=True)
    ids = make("gpt", 4)[1][0]
    assert torch.equal(model(ids), other(ids))


def test_one_file_loads_strictly_into_the_plain_model(trained: tuple[TiedGPT, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, run = trained
    assert main(["convert", str(run), str(tmp_path / "model.safetensors")]) == 0
    assert_loads(model, load_file(tmp_path / "model.safetensors"))
    assert main(["convert", str(newest(run)), str(tmp_path / "model.pt"), "--quiet"]) == 0
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert state["head.weight"].data_ptr() == state["wte.weight"].data_ptr()
    assert_loads(model, state)


def test_and_back(trained: tuple[TiedGPT, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_model

    model, run = trained
    save_model(model, str(tmp_path / "model.safetensors"))  # leaves the tied embedding out
    torch.save(model.state_dict(), tmp_path / "model.pt")
    convert(run, tmp_path / "shards", max_shard_bytes=9000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for i, source in enumerate(("model.safetensors", "model.pt", "shards")):
        (written,) = convert(tmp_path / source, tmp_path / f"back{i}", to="checkpoint")
        assert written.name == "step-00000000"
        again = engine(TiedGPT())
        assert again.load_checkpoint(tmp_path / f"back{i}") is None
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in again.state_dict().items())


def test_transformers_loads_what_was_converted(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=12, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 40, (4, 12))
    run = autopipe.pipeline(model, example_kwargs={"input_ids": ids, "labels": ids}, optimizer=ADAM)
    run.train_batch(input_ids=ids, labels=ids)
    run.save_checkpoint(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hub", max_shard_bytes=20_000)
    assert (tmp_path / "hub" / "model.safetensors.index.json").is_file()
    config.save_pretrained(tmp_path / "hub")
    other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hub")
    with torch.no_grad():
        assert torch.equal(other.eval()(ids).logits, model.eval()(ids).logits)


def test_layers_of_deepspeed_become_a_checkpoint(tmp_path: Path) -> None:
    """The files and keys are those of DeepSpeed's `PipelineModule.save_state_dict`: a state dict for each layer with
    parameters."""
    model, folder = TiedGPT(layers=2), tmp_path / "global_step3"
    folder.mkdir()
    layers = {0: model.wte, 1: model.wpe, 3: model.blocks[0], 4: model.blocks[1], 5: model.norm}
    for number, layer in layers.items():
        torch.save(layer.state_dict(), folder / f"layer_{number:02d}-model_00-model_states.pt")
    names = {"0": "wte", "1.weight": "wpe.weight", "3": "blocks.0", "04": "blocks.1", "5": "norm"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    (tmp_path / "latest").write_text("global_step3")
    convert(tmp_path, tmp_path / "run", names=tmp_path / "names.json")
    assert set(Reader(newest(tmp_path / "run")).names) == set(model.state_dict()) - {"head.weight"}
    again = engine(TiedGPT(layers=2))
    again.load_checkpoint(tmp_path / "run")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in again.state_dict().items())

    with pytest.raises(autopipe.ConfigError, match="--names"):
        convert(folder, tmp_path / "other")
    (tmp_path / "names.json").write_text(json.dumps({k: v for k, v in names.items() if k != "3"}))
    with pytest.raises(autopipe.CheckpointError, match="layer 3, which has no name"):
        convert(folder, tmp_path / "other", names=tmp_path / "names.json")
    torch.save({}, folder / "layer_05-model_01-model_states.pt")
    with pytest.raises(autopipe.CheckpointError, match="layer 5 in several files"):
        convert(folder, tmp_path / "other", names=tmp_path / "names.json")
    assert not (tmp_path / "other").exists()


def test_nothing_is_overwritten(trained: tuple[TiedGPT, Path], tmp_path: Path) -> None:
    _, run = trained
    for out in ("a.safetensors", "a.pt", "folder"):
        convert(run, tmp_path / out)
        with pytest.raises(autopipe.CheckpointError, match="there already"):
            convert(run, tmp_path / out)
    convert(tmp_path / "a.pt", tmp_path / "back")
    with pytest.raises(autopipe.CheckpointError, match="there already"):
        convert(tmp_path / "a.pt", tmp_path / "back")
    with pytest.raises(autopipe.CheckpointError, match="No such file"):
        convert(run, tmp_path / "no" / "folder.pt")


def test_strided_and_old_torch_files_are_read(tmp_path: Path) -> None:
    wide = torch.arange(12.0).view(3, 4)
    state = {"t": wide.t(), "row": wide[1], "b": wide.bfloat16(), "flag": torch.tensor(True), "none": torch.empty(0, 3)}
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("new.pt", "old.pt"):
        weights = open_weights(tmp_path / name)
        assert {n: weights.stored[n].shape for n in weights} == {n: tuple(t.shape) for n, t in state.items()}
        assert all(torch.equal(weights[n], t) and weights[n].dtype == t.dtype for n, t in state.items())


STREAMED = """
import sys
from pathlib import Path
import torch
from autopipe.checkpoint import convert, open_weights
from scenarios.resident_memory import resident, restart_peak
folder = Path(sys.argv[1])
torch.save({str(i): torch.full((1024, 1024), float(i)) for i in range(2)}, folder / "small.pt")
def there_and_back(name):
    convert(folder / f"{name}.pt", folder / name)
    for out in (f"{name}.safetensors", f"{name}-back.pt", f"{name}-shards"):
        restart_peak()
        before = resident("VmRSS")
        convert(folder / name, folder / out, max_shard_bytes=32 * 2**20)
        yield resident("VmHWM") - before
list(there_and_back("small"))
torch.save({str(i): torch.full((1024, 2048), float(i)) for i in range(12)}, folder / "large.pt")
print(max(there_and_back("large")))
assert all(bool((t == float(n)).all()) for n, t in open_weights(folder / "large-back.pt").items())
"""


def test_tensors_are_streamed(tmp_path: Path) -> None:
    """96 MiB in tensors of 8 MiB and shards of 32 MiB: no more than half a shard beyond one."""
    done = subprocess.run(
        [sys.executable, "-c", STREAMED, str(tmp_path)], capture_output=True, text=True, check=True, timeout=100
    )
    assert int(done.stdout) < 1.5 * 32 * 2**20
