"""A checkpoint is whole or not there, and any layout of stages, replicas and ZeRO reads what any other wrote."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autopipe
from scenarios.pipelines import make
from tests.gloo.launch import run_ranks, try_ranks

LAYOUTS = {
    "1": (1, 1, 0),
    "2": (2, 1, 0),
    "4": (4, 1, 0),
    "2x2": (4, 2, 0),
    "2x2 zero": (4, 2, 1),
    "1x2 zero": (2, 2, 1),
}


FIXED = {"split_points": ["blocks.2"], "schedule": "1f1b"}
"""The norm that gradients are clipped by is summed stage by stage, so that runs are the same bit for bit only where the
cut is."""


def _engine(data_parallel: int, zero_stage: int, optimizer: Any, **options: Any) -> tuple[Any, Any, Any]:
    model, args, _, target, loss_fn = make("gpt", 12)
    engine = autopipe.pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=optimizer,
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5),
        num_microbatches=4 // data_parallel,
        data_parallel=data_parallel,
        zero_stage=zero_stage,
        max_grad_norm=1.0,
        seed=3,
        **options,
    )
    return engine, args, target


ADAM = partial(torch.optim.AdamW, lr=1e-2, eps=1e-4)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def _save(directory: str, data_parallel: int, zero_stage: int, optimizer: Any) -> tuple[dict[str, Any], list[float]]:
    engine, args, target = _engine(data_parallel, zero_stage, optimizer)
    for _ in range(3):
        engine.train_batch(*args, target=target)
    engine.save_checkpoint(directory, client_state={"position": 36}, keep=2)
    state = {n: t.numpy() for n, t in engine.state_dict().items()}
    later = [float(engine.train_batch(*args, target=target)) for _ in range(3)]
    engine.close()
    return state, later


def _load(
    directory: str, data_parallel: int, zero_stage: int, optimizer: Any, late: bool, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], list[float]]:
    engine, args, target = _engine(data_parallel, zero_stage, optimizer, **options)
    if late:
        engine.train_batch(*args, target=target)
    client = engine.load_checkpoint(directory)
    if not late:
        engine.prepare(args, {}, target)
    state = {n: t.numpy() for n, t in engine.state_dict().items()}
    later = [float(engine.train_batch(*args, target=target)) for _ in range(3)]
    engine.close()
    return client, state, later


@pytest.mark.parametrize(
    ("saved", "loaded", "optimizer", "late"),
    [
        ("2", "1", ADAM, False),
        ("1", "4", SGD, False),
        ("4", "2x2 zero", ADAM, True),
        ("2x2 zero", "2", ADAM, False),
        ("2x2", "1x2 zero", SGD, True),
    ],
    ids=["2 to 1", "1 to 4", "4 to 2x2 zero", "2x2 zero to 2", "2x2 to 1x2 zero"],
)
def test_any_layout_reads_what_any_other_wrote(
    saved: str, loaded: str, optimizer: Any, late: bool, tmp_path: Path
) -> None:
    ranks, *layout = LAYOUTS[saved]
    state, later = run_ranks(_save, ranks, str(tmp_path), *layout, optimizer)[0]
    ranks, *layout = LAYOUTS[loaded]
    for client, again, losses in run_ranks(_load, ranks, str(tmp_path), *layout, optimizer, late, {}):
        assert client == {"position": 36}
        assert all((again[n] == t).all() for n, t in state.items())
        assert losses == pytest.approx(later, rel=1e-5)


def _die_while_saving(directory: str, moment: str) -> None:
    model, x = nn.Linear(4, 4), torch.randn(4, 4)
    engine = autopipe.pipeline(model, (x,), example_target=x, loss_fn=F.mse_loss, optimizer=SGD)
    engine.train_batch(x, target=x)
    engine.save_checkpoint(directory)
    engine.train_batch(x, target=x)

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "tensors":
        torch.distributed.checkpoint.filesystem.FileSystemWriter.finish = die  # type: ignore[method-assign]
    else:
        os.fsync = die  # type: ignore[assignment]
    engine.save_checkpoint(directory)


@pytest.mark.parametrize("moment", ["tensors", "meta"])
def test_a_crash_while_saving_leaves_the_last_whole_one(moment: str, tmp_path: Path) -> None:
    assert try_ranks(_die_while_saving, 1, str(tmp_path), moment)[0] == ("died", -signal.SIGKILL)
    assert autopipe.checkpoint.newest(tmp_path).name == "step-00000001"
    model, x = nn.Linear(4, 4), torch.randn(4, 4)
    engine = autopipe.pipeline(model, (x,), example_target=x, loss_fn=F.mse_loss, optimizer=SGD)
    engine.load_checkpoint(tmp_path)
    assert engine.steps == 1


def _small(tmp_path: Path, width: int = 4) -> Any:
    x = torch.randn(4, width)
    engine = autopipe.pipeline(nn.Linear(width, width), (x,), example_target=x, loss_fn=F.mse_loss, optimizer=ADAM)
    engine.train_batch(x, target=x)
    return engine


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["AUTOPIPE_TEST_BOMB"],)


def test_a_pickle_in_a_checkpoint_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPIPE_TEST_BOMB", str(tmp_path / "exploded"))
    path = _small(tmp_path).save_checkpoint(tmp_path / "run")
    for name in (".metadata", *(p.name for p in path.glob("*.distcp"))):
        kept = (path / name).read_bytes()
        (path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(autopipe.CheckpointError, match="remedy"):
            _small(tmp_path).load_checkpoint(tmp_path / "run")
        (path / name).write_bytes(kept)
    assert not (tmp_path / "exploded").exists()


def test_damaged_foreign_and_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(autopipe.CheckpointError, match="no whole checkpoint"):
        _small(tmp_path).load_checkpoint(tmp_path)
    path = _small(tmp_path).save_checkpoint(tmp_path / "run")
    with pytest.raises(autopipe.CheckpointError, match="same model"):
        _small(tmp_path, width=5).load_checkpoint(tmp_path / "run")
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:40])
    with pytest.raises(autopipe.CheckpointError, match="remedy"):
        _small(tmp_path).load_checkpoint(tmp_path / "run")
    (path / "meta.json").write_text("{")
    with pytest.raises(autopipe.CheckpointError, match=r"meta\.json"):
        _small(tmp_path).load_checkpoint(tmp_path / "run")


def test_old_checkpoints_are_removed_and_a_step_can_be_saved_again(tmp_path: Path) -> None:
    engine = _small(tmp_path)
    for step in (1, 2, 3, 3):
        engine.save_checkpoint(tmp_path, step=step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    with pytest.raises(autopipe.CheckpointError, match="JSON"):
        engine.save_checkpoint(tmp_path, step=4, client_state=object())
    assert autopipe.checkpoint.newest(tmp_path).name == "step-00000003"


def _save_beside(directory: str) -> tuple[list[float], list[str], dict[str, Any], dict[str, Any]]:
    engine, args, target = _engine(1, 0, ADAM, **FIXED)
    engine.train_batch(*args, target=target)
    saved = {n: t.numpy().copy() for n, t in engine.state_dict().items()}
    state = {"list": [1]}
    engine.save_checkpoint(directory, client_state=state, asynchronous=True)
    state["list"].append(2)  # as the copies of tensors, the copy of this is what is saved
    losses = [float(engine.train_batch(*args, target=target)) for _ in range(2)]
    engine.save_checkpoint(directory, asynchronous=True)
    engine.close()
    names = sorted(p.name for p in Path(directory).iterdir())
    return losses, names, saved, state


def test_an_asynchronous_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    losses, names, saved, _ = run_ranks(_save_beside, 2, str(tmp_path))[0]
    assert names == ["step-00000001", "step-00000003"]
    client, state, later = run_ranks(_load, 2, str(tmp_path / "step-00000001"), 1, 0, ADAM, False, FIXED)[0]
    assert client == {"list": [1]}
    assert all((state[n] == t).all() for n, t in saved.items())
    assert later[:2] == losses


def _fail_beside(directory: str) -> list[str]:
    engine, args, target = _engine(1, 0, ADAM)
    engine.train_batch(*args, target=target)
    engine.save_checkpoint(directory)
    engine.train_batch(*args, target=target)
    if engine.stage == 1:
        _full_disk()
    told = []
    for call in (partial(engine.train_batch, *args, target=target), engine.close):
        try:
            engine.save_checkpoint(directory, asynchronous=True)
            engine._saver._thread.join()
            call()
        except autopipe.CheckpointError as error:
            told.append(str(error))
    return told


def _full_disk() -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    writer: Any = torch.distributed.checkpoint.filesystem.FileSystemWriter
    writer.write_data = fail


def test_a_failure_beside_training_is_raised_by_the_next_call_on_every_rank(tmp_path: Path) -> None:
    for told in run_ranks(_fail_beside, 2, str(tmp_path), fresh=True):
        assert len(told) == 2
        assert all("No space left" in t for t in told)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
