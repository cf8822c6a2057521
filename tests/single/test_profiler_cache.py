"""Measurements on disk: read again where they hold, measured again where they do not."""

from __future__ import annotations

import json

import pytest
import torch
from torch import fx, nn

import profiler
from profiler.nodes import NodeTimer
from tests.models.graphs import Gpt


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Names of the nodes that were really measured; the cache is in a folder of its own."""
    names = []
    original = NodeTimer.measure
    monkeypatch.setattr(
        NodeTimer, "measure", lambda self, call, *args: names.append(call.node.name) or original(self, call, *args)
    )
    monkeypatch.setenv("AUTOPIPE_CACHE_DIR", str(tmp_path))
    return names


MODEL, IDS = Gpt(), torch.randint(0, 211, (2, 32))


def run(model=MODEL, args=(IDS, IDS), **kwargs):
    options = {"budget_s": 0.3, "progress": False, "calibrate": False, "relative_error": 1e6, **kwargs}
    return profiler.profile(fx.symbolic_trace(model), args, **options)


def test_a_second_profile_measures_nothing(measured, tmp_path):
    first = run()
    assert len(measured) > 10 and not list(tmp_path.rglob("*.tmp"))
    measured.clear()
    assert run() == first and not measured
    assert run(Gpt(layers=5)).nodes[3] == first.nodes[3] and not measured


def test_off_reads_and_writes_nothing(measured, tmp_path):
    run(cache=False)
    assert not list(tmp_path.iterdir())


def test_what_an_entry_holds_for(measured, monkeypatch):
    run()
    for change in (
        {"relative_error": 0.01},
        {"args": (IDS[:1], IDS[:1])},
        {"train": False},
    ):
        measured.clear()
        run(**change)
        assert len(measured) > 10, change
    for name, other in (("torch.__version__", "9.9"), ("torch.get_num_threads", lambda: 77)):
        measured.clear()
        with monkeypatch.context() as patch:
            patch.setattr(name, other)
            run()
        assert len(measured) > 10, name


@pytest.mark.parametrize(
    "fault", ["", "{", "null", "[]", '{"digest": "x", "body": {}}', "swap", "number", "nan", "forged"]
)
def test_entries_that_are_not_valid_are_measured_again(measured, tmp_path, fault):
    first = run()
    count = len(set(measured))
    files = sorted(tmp_path.rglob("*.json"))
    texts = [f.read_text() for f in files]
    for i, file in enumerate(files):
        if fault == "swap":
            file.write_text(texts[i - 1])
        elif fault == "number":
            file.write_text(texts[i].replace('"forward_us": ', '"forward_us": 1'))
        elif fault in ("nan", "forged"):
            file.write_text(forged(json.loads(texts[i]), fault))
        else:
            file.write_text(fault)
    measured.clear()
    again = run()
    assert len(set(measured)) == count and len(files) <= count
    assert [n.saved_bytes for n in again.nodes] == [n.saved_bytes for n in first.nodes]
    measured.clear()
    run()
    assert not measured


def forged(entry, fault):
    """An entry with a fitting digest and a value that no measurement gives."""
    from profiler.cache import digest

    if fault == "nan":
        entry["body"]["timing"]["forward_us"] = float("nan")
    else:
        entry["body"]["trace"]["leaves"] = entry["body"]["trace"]["leaves"][1:]
    entry["digest"] = digest(entry["body"])
    return json.dumps(entry)


class Own(nn.Module):
    def forward(self, x):
        return own_function(x)


def own_function(x):
    return x.exp()


fx.wrap("own_function")


def test_the_users_own_code_is_measured_in_each_process(measured, tmp_path):
    run(Own(), (torch.randn(3),))
    assert measured == ["own_function"] and not list(tmp_path.rglob("*.json"))


def test_a_folder_that_cannot_be_written_is_said(measured, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOPIPE_CACHE_DIR", str(tmp_path / "file"))
    run()
    assert "not cached" in caplog.text and caplog.text.count("not cached") == 1


def test_the_users_cache_directory(monkeypatch, tmp_path):
    from profiler.cache import cache_dir

    monkeypatch.delenv("AUTOPIPE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "autopipe"
