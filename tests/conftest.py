"""Marks the tests of `pytest -m fast`, which take half a minute together.

They are all of `tests/pure` but those that search long, and a few of `tests/single`. Which ones is decided here alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SEARCH_LONG = {
    "test_partition_annealing.py",
    "test_partition_constraints.py",
    "test_partition_exact.py",
    "test_partition_parts.py",
    "test_partition_recompute.py",
    "test_search.py",
    "test_every_interleaving_of_stages",
    "test_every_single_skip",
    "test_the_same_seed_gives_the_same_plan",
    "test_what_is_written_is_read_again",
}
"""Files and tests of `tests/pure` that are left out."""
ALSO = {"test_capture.py", "test_clock.py", "test_stages.py"}
"""Files of `tests/single` that are taken in."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the fast tests."""
    for item in items:
        folder, name = item.path.relative_to(TESTS).parts[0], item.path.name
        test = getattr(item, "originalname", item.name)
        if (folder == "pure" and not {name, test} & SEARCH_LONG) or (folder == "single" and name in ALSO):
            item.add_marker(pytest.mark.fast)
