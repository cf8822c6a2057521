"""Checkpoints and weights from anyone: whatever is in the files, tensors are those that were written, or an error names
the file.

Nothing in them is executed, nothing outside of them is read, and nothing is overwritten.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import autopipe
from autopipe.checkpoint import MODEL, Reader, convert, newest, open_weights, write
from autopipe.checkpoint.folders import sealed
from autopipe.checkpoint.unpickling import SafeUnpickler

TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.tensor(7), "c": torch.arange(6).view(2, 3).bfloat16()}
META = {
    "plan": None,
    "names": {n: n for n in TENSORS},
    "options": {"a.weight": {"lr": 0.1}},
    "lr_scheduler": None,
    "loss_scale": None,
    "seed": 3,
    "client_state": {"steps": 2, "client": {"position": [1, 2]}},
}


def _instead(content: bytes, _: bytes) -> bytes:
    """Return other content for a file."""
    return content


def make(folder: Path) -> None:
    """One of each file that can be loaded."""
    from safetensors.torch import save_file

    write(folder / "run", 2, {MODEL + n: t for n, t in TENSORS.items()}, META)
    save_file(TENSORS, folder / "a.safetensors")
    torch.save(TENSORS, folder / "a.pt")
    torch.save(TENSORS, folder / "old.pt", _use_new_zipfile_serialization=False)
    convert(folder / "run", folder / "shards", max_shard_bytes=20)
    layers = folder / "global_step1"
    layers.mkdir()
    torch.save({"weight": TENSORS["a.weight"]}, layers / "layer_00-model_states.pt")
    (folder / "names.json").write_text(json.dumps({"0": "a"}))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make(folder)
    return folder


def read_all(folder: Path, kind: str) -> dict[str, Tensor]:
    """Reads everything that the file of this kind belongs to."""
    if kind in ("meta", "metadata", "data"):
        reader = Reader(newest(folder / "run"))
        assert {k: reader.meta[k] for k in META} == META
        return {n: reader.read(MODEL + n) for n in reader.names}
    if kind in ("layer", "names"):
        (step,) = convert(folder / "global_step1", folder / "converted", names=folder / "names.json")
        return dict(open_weights(step))
    places = {
        "safetensors": "a.safetensors",
        "torch": "a.pt",
        "old torch": "old.pt",
        "index": "shards",
        "shard": "shards",
    }
    return dict(open_weights(folder / places[kind]))


def file_of(folder: Path, kind: str) -> Path:
    return {
        "meta": folder / "run" / "step-00000002" / "meta.json",
        "metadata": folder / "run" / "step-00000002" / ".metadata",
        "data": next((folder / "run" / "step-00000002").glob("*.distcp")),
        "safetensors": folder / "a.safetensors",
        "torch": folder / "a.pt",
        "old torch": folder / "old.pt",
        "index": folder / "shards" / "model.safetensors.index.json",
        "shard": next((folder / "shards").glob("model-00001*")),
        "layer": folder / "global_step1" / "layer_00-model_states.pt",
        "names": folder / "names.json",
    }[kind]


KINDS = ["meta", "metadata", "data", "safetensors", "torch", "old torch", "index", "shard", "layer", "names"]
CHECKED = ["meta", "metadata", "data"]
"""What has a checksum: no other value than that which was written comes out. The others are files of other programs,
without one."""


def damaged(good: Path, kind: str, change: Callable[[bytes], bytes]) -> dict[str, Tensor] | None:
    """What is read after a change of one file; None where a CheckpointError told of it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(good, folder)
        file = file_of(folder, kind)
        file.write_bytes(change(file.read_bytes()))
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        try:
            found: dict[str, Tensor] | None = read_all(folder, kind)
        except (autopipe.CheckpointError, autopipe.ConfigError) as error:
            assert error.remedy
            found = None
        assert {p: p.read_bytes() for p in before} == before
        assert [p.name for p in Path(place).iterdir()] == ["copy"]
        return found


def test_what_is_whole_is_read(good: Path) -> None:
    for kind in KINDS:
        found = damaged(good, kind, lambda content: content)
        assert found
        assert all(torch.equal(found[n], TENSORS[n]) for n in found)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_bytes(kind: str, good: Path, data: st.DataObject) -> None:
    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        at = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "write", "drop"]))
        if how == "flip":
            changed[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del changed[at:]
        elif how == "drop":
            del changed[at : at + data.draw(st.integers(1, 100))]
        else:
            changed[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
        return bytes(changed)

    found = damaged(good, kind, change)
    if found is not None and kind in CHECKED:
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[n], TENSORS[n]) for n in found)


def forge(folder: Path, **fields: Any) -> None:
    """Changes fields of `meta.json` and makes its digest right, as somebody who means harm would."""
    file = file_of(folder, "meta")
    file.write_text(sealed({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("field", ["schema", "names", "checksums", "seed", "client_state"])
@pytest.mark.parametrize(
    "value", [None, -1, 1e400, "x", [], {}, {"b": ["../b"]}, {"b": None, "steps": "x"}, {"steps": 1e400}]
)
def test_a_forged_meta_json_is_told_or_harmless(field: str, value: Any, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "copy")
    forge(tmp_path / "copy", **{field: value})
    harmless = field == "seed" and (value is None or value == -1)
    try:
        Reader(newest(tmp_path / "copy" / "run"))
        if field == "names":
            open_weights(tmp_path / "copy" / "run")
            harmless = value == {}
    except autopipe.CheckpointError as error:
        assert error.remedy
        return
    assert harmless


def test_forged_options_of_the_optimizer_are_told(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    start = partial(autopipe.pipeline, example_args=(x,), example_target=x, loss_fn=torch.nn.functional.mse_loss)
    engine = start(torch.nn.Linear(4, 4), optimizer=torch.optim.AdamW)
    engine.train_batch(x, target=x)
    file = engine.save_checkpoint(tmp_path) / "meta.json"
    good = json.loads(file.read_text())
    for fields in ({"options": {"weight": 3}}, {"options": None}, {"loss_scale": "xy"}, {"loss_scale": 3}):
        file.write_text(sealed({**good, **fields}))
        with pytest.raises(autopipe.CheckpointError, match="remedy"):
            engine.load_checkpoint(tmp_path)
    file.write_text(sealed(good))
    engine.load_checkpoint(tmp_path)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["AUTOPIPE_TEST_BOMB"],)


def in_a_zip(content: bytes) -> bytes:
    """The torch file with a bomb for its pickle."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").write_bytes(content)
        with zipfile.ZipFile(Path(folder) / "a") as old, zipfile.ZipFile(Path(folder) / "b", "w") as new:
            for item in old.infolist():
                bomb = item.filename.endswith("data.pkl")
                new.writestr(item.filename, pickle.dumps({"a.weight": Bomb()}) if bomb else old.read(item))
        return (Path(folder) / "b").read_bytes()


def saved_bomb(**options: Any) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        torch.save({"a.weight": Bomb()}, file.name, **options)
        return Path(file.name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_bomb_is_never_executed(
    kind: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPIPE_TEST_BOMB", str(tmp_path / "exploded"))
    bombs = [pickle.dumps(Bomb(), 2), pickle.dumps({"a.weight": Bomb()}), saved_bomb()]
    bombs.append(saved_bomb(_use_new_zipfile_serialization=False))
    if kind in ("torch", "layer"):
        bombs.append(in_a_zip(file_of(good, kind).read_bytes()))
    for bomb in bombs:
        assert damaged(good, kind, partial(_instead, bomb)) is None
        assert not (tmp_path / "exploded").exists()
    pickle.loads(bombs[0])
    assert (tmp_path / "exploded").exists()


def test_plans_and_profiles_are_no_place_for_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import profiler

    monkeypatch.setenv("AUTOPIPE_TEST_BOMB", str(tmp_path / "exploded"))
    for bomb in (pickle.dumps(Bomb()), pickle.dumps(Bomb(), 0), saved_bomb()):
        (tmp_path / "file.json").write_bytes(bomb)
        with pytest.raises(autopipe.PlanError):
            autopipe.Plan.load(tmp_path / "file.json")
        with pytest.raises(autopipe.ProfileError):
            profiler.Profile.load(tmp_path / "file.json")
    assert not (tmp_path / "exploded").exists()


def test_files_outside_are_not_read(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "copy")
    (tmp_path / "outside.distcp").write_bytes(file_of(good, "data").read_bytes())
    (tmp_path / "outside.safetensors").write_bytes((good / "a.safetensors").read_bytes())
    metadata = file_of(tmp_path / "copy", "metadata")
    with open(metadata, "rb") as file:
        content = SafeUnpickler(file).load()
    for info in content.storage_data.values():
        info.relative_path = "../../../outside.distcp"
    metadata.write_bytes(pickle.dumps(content))
    with pytest.raises(autopipe.CheckpointError, match="leaves the checkpoint"):
        read_all(tmp_path / "copy", "metadata")
    index = file_of(tmp_path / "copy", "index")
    for name in ("../../outside.safetensors", str(tmp_path / "outside.safetensors"), "..", ""):
        index.write_text(json.dumps({"weight_map": {"b": name}}))
        with pytest.raises(autopipe.CheckpointError, match="outside of the folder"):
            read_all(tmp_path / "copy", "index")


def test_absurd_sizes_are_refused_before_memory_is_taken(good: Path, tmp_path: Path) -> None:
    def safetensors(header: Any, length: int | None = None) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + bytes(64)

    entry = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    for content in (
        safetensors({"a": entry}),
        safetensors({"a": entry | {"data_offsets": [0, 16]}}),
        safetensors({"a": entry | {"shape": [2**62, 2**62], "data_offsets": [0, 2**126]}}),
        safetensors({"a": entry | {"shape": [-1], "data_offsets": [4, 0]}}),
        safetensors({"a": {"dtype": "F33", "shape": [], "data_offsets": [0, 4]}}),
        safetensors({}, length=2**63),
        safetensors({}, length=50),
        b"",
    ):
        assert damaged(good, "safetensors", partial(_instead, content)) is None
    with open(file_of(good, "metadata"), "rb") as file:
        metadata = SafeUnpickler(file).load()
    for item in metadata.state_dict_metadata.values():
        item.size = torch.Size([2**40])
    assert damaged(good, "metadata", lambda _: pickle.dumps(metadata)) is None
    with (
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as new,
        zipfile.ZipFile(good / "a.pt") as old,
    ):
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    with pytest.raises(autopipe.CheckpointError, match="compressed"):
        open_weights(tmp_path / "packed.pt")


def test_a_step_is_a_number(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    engine = autopipe.pipeline(torch.nn.Linear(4, 4), (x,), example_target=x, loss_fn=torch.nn.functional.mse_loss)
    with pytest.raises(autopipe.ConfigError, match="step = -1"):
        engine.save_checkpoint(tmp_path / "run", step=-1)
    assert not (tmp_path / "run").exists()
