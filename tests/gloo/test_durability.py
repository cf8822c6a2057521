"""A small part of each matrix of `benchmarks/durability`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.durability.crash import crash, save_on_a_full_disk
from benchmarks.durability.reshard import is_right, matrix
from tests.gloo.launch import run_ranks


def test_layouts_read_each_other_bit_for_bit(tmp_path: Path) -> None:
    rows = matrix("adamw", ["3", "1x2 zero"], tmp_path)
    assert len(rows) == 4
    assert all(map(is_right, rows)), rows


@pytest.mark.parametrize(("ranks", "asynchronous"), [(1, True), (2, False)])
def test_what_was_saved_is_there_after_a_kill(ranks: int, asynchronous: bool, tmp_path: Path) -> None:
    row = crash(tmp_path / "run", ranks=ranks, asynchronous=asynchronous, width=128, chance=random.Random(ranks))
    assert not row["lost"], row


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    for told, stood in run_ranks(save_on_a_full_disk, 2, str(tmp_path / "run"), 1000, False, 64):
        assert "File too large" in told
        assert stood == 1
