"""The facts of each schedule stand in one table, and are those of its generator."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from autopipe.schedule import Edge, build_schedule
from autopipe.schedule.kinds import KINDS, PLANNED, TRAINING, TRIED, ScheduleKind

SOURCE = Path(__file__).parents[2] / "autopipe"
# "forward" is also the name of a method of every module, of a phase and of a bar in a chart.
NAMES = set(KINDS) - {"forward"}
SHAPES = [(1, 1, 1), (2, 1, 2), (3, 5, 3), (4, 9, 4), (4, 4, 2), (6, 7, 3), (6, 2, 2)]


def _string_literals(path: Path) -> list[str]:
    """Literals in code; docstrings are expressions of their own, and left out."""
    tree = ast.parse(path.read_text())
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone
    ]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_other_file_names_a_schedule(path: Path) -> None:
    if path != SOURCE / "schedule" / "kinds.py":
        assert not NAMES & set(_string_literals(path))


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_the_facts_are_those_of_the_generator(kind: ScheduleKind) -> None:
    for num_stages, num_microbatches, num_ranks in SHAPES:
        if num_stages > num_ranks and not kind.several_stages_a_rank:
            continue
        orders = kind.orders(num_stages, num_microbatches, num_ranks)
        computes = {action.kind for order in orders for action in order}
        assert ("I" in computes and "W" in computes) == (kind.divides_backward and kind.has_backward)
        assert (computes != {"F"}) == kind.has_backward
        for rank, order in enumerate(orders):
            live, most = 0, 0
            for action in order:
                live += {"F": 1, "I": 0}.get(action.kind, -1)
                most = max(most, live)
            assert most <= kind.live(num_stages, num_microbatches, num_ranks, rank), (num_stages, num_microbatches)
        edges = [Edge(s, s + 1, kind.has_backward) for s in range(num_stages - 1)]
        build_schedule(kind.name, num_stages, num_microbatches, edges, num_ranks=num_ranks)


def test_a_row_lacks_no_fact() -> None:
    with pytest.raises(TypeError, match="missing"):
        ScheduleKind(name="new", orders=KINDS["gpipe"].orders)  # type: ignore[call-arg]


def test_names_that_users_choose_from() -> None:
    assert set(PLANNED) <= set(TRAINING) == set(KINDS) - {"forward"}
    assert set(TRIED) <= set(TRAINING)
    assert TRIED[0] in PLANNED, "the first of equally fast schedules is the one that cuts are made for"
