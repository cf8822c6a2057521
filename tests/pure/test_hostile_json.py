"""Plans and profiles from anyone: whatever is in the file, it is a valid record or an error that names it, at once."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopipe.errors import AutopipeError, PlanError, ProfileError
from autopipe.plan import Plan
from profiler.records import Profile

PLAN: dict[str, Any] = {
    "schema": "autopipe.plan/1",
    "graph_hash": "abc",
    "num_stages": 2,
    "num_microbatches": 4,
    "stages": [
        {"index": 0, "nodes": ["a", "b"], "params": ["w"], "forward_us": 3.0, "recompute": [["a"]]},
        {"index": 1, "nodes": ["c"], "peak_bytes": 100},
    ],
    "transfers": [{"source": 0, "target": 1, "nodes": ["b"], "forward_bytes": 8, "backward_bytes": 8}],
    "ties": {"w": [0, 1]},
    "link": {"latency_us": 1.0, "bytes_per_us": 100.0},
    "baselines": [{"name": "equal", "step_us": 9.0, "imbalance": 0.1, "bubble": 0.2, "peak_bytes": 5}],
}
PROFILE: dict[str, Any] = {
    "schema": "autopipe.profile/1",
    "nodes": [
        {"name": "a", "inputs": [], "forward_us": 9, "backward_us": 18, "output_bytes": 4, "params": ["w"]},
        {"name": "b", "inputs": ["a"], "forward_us": 1, "backward_us": 2, "output_bytes": 4, "saved_bytes": 3},
    ],
    "parameters": {"w": {"bytes": 16, "trainable": True}},
    "link": {"latency_us": 1.0, "bytes_per_us": 100.0},
}
KINDS: list[tuple[dict[str, Any], Callable[[Path], Any], type[AutopipeError]]] = [
    (PLAN, Plan.load, PlanError),
    (PROFILE, Profile.load, ProfileError),
]
NUMBERS = [-1, 0, 1.5, 10**30, -(10**400), math.inf, -math.inf, math.nan]
TEXTS = ["", "a", "../../etc/passwd", "\x00", "x" * 9999]
NESTED = [[], {}, [[]], [None], ["a", "a"], {"a": {}}, [1, [2, [3]]], json.loads("[" * 200 + "]" * 200)]
ODD = st.sampled_from([None, True, *NUMBERS, *TEXTS, *NESTED])


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every key of every object and index of every list in a JSON value."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def load(load_file: Callable[[Path], Any], content: bytes, error: type[AutopipeError]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.json"
        file.write_bytes(content)
        try:
            load_file(file)
        except error as caught:
            assert caught.remedy
        assert [p.name for p in Path(folder).iterdir()] == ["file.json"]
        assert file.read_bytes() == content


@pytest.mark.parametrize(("good", "load_file", "error"), KINDS, ids=["plan", "profile"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_value_in_any_place(good: Any, load_file: Any, error: Any, data: st.DataObject) -> None:
    changed = copy.deepcopy(good)
    for _ in range(data.draw(st.integers(1, 3))):
        found = list(places(changed))
        if not found:
            break
        holder, key = found[data.draw(st.integers(0, len(found) - 1))]
        action = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace" or isinstance(holder, list):
            holder[key] = copy.deepcopy(data.draw(ODD))
        elif action == "remove":
            del holder[key]
        else:
            holder[str(data.draw(ODD))] = copy.deepcopy(data.draw(ODD))
    load(load_file, json.dumps(changed).encode(), error)


@pytest.mark.parametrize(("good", "load_file", "error"), KINDS, ids=["plan", "profile"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_bytes(good: Any, load_file: Any, error: Any, data: st.DataObject) -> None:
    content = bytearray(json.dumps(good).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(at, len(content)))
        content[at : data.draw(st.sampled_from([at, end, len(content)]))] = data.draw(st.binary(max_size=8))
    load(load_file, bytes(content), error)


@pytest.mark.parametrize(("good", "load_file", "error"), KINDS, ids=["plan", "profile"])
def test_nesting_without_end_and_foreign_files(good: Any, load_file: Any, error: Any, tmp_path: Path) -> None:
    for content in (b"[" * 10**6, b'{"schema":' * 10**5, b"\x80\x04cos\nsystem\n", b"PK\x03\x04", b"", b"\xff\xfe"):
        (tmp_path / "file.json").write_bytes(content)
        with pytest.raises(error, match="remedy"):
            load_file(tmp_path / "file.json")
    with pytest.raises(error, match="remedy"):
        load_file(tmp_path)
    (tmp_path / "good.json").write_text(json.dumps(good))
    load_file(tmp_path / "good.json")
