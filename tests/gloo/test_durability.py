"""A small part of each matrix of `benchmarks/durability`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gloo.durability import ran


def test_layouts_read_each_other_bit_for_bit(tmp_path: Path) -> None:
    rows = ran("reshard", "--layouts", "3", "1x2 zero", "--optimizers", "adamw", folder=tmp_path)["rows"]
    assert len(rows) == 4
    for row in rows:
        assert not row["different"], row
        assert row["client_state"], row
        assert row["loss_error"] <= 1e-6, row


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ran("crash", "--crashes", "4", "--width", "128", folder=tmp_path_factory.mktemp("crash"))


@pytest.mark.parametrize(("ranks", "asynchronous"), [(1, True), (2, False)])
def test_what_was_saved_is_there_after_a_kill(crashes: dict[str, Any], ranks: int, asynchronous: bool) -> None:
    (row,) = (r for r in crashes["crashes"] if (r["ranks"], r["asynchronous"]) == (ranks, asynchronous))
    assert not row["lost"], row
    assert row["killed"] > 0


def test_a_full_disk_leaves_the_last_checkpoint(crashes: dict[str, Any]) -> None:
    rows = [r for r in crashes["full_disks"] if (r["ranks"], r["limit"], r["asynchronous"]) == (2, 1000, False)]
    assert len(rows) == 2
    for row in rows:
        assert "File too large" in row["error"]
        assert row["stood"] == 1
