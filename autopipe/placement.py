"""Placement of another graph of the same model: evaluation and other shapes follow the parameters that a plan
has placed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx, nn

from autopipe.capture.captured import Captured
from autopipe.errors import PlanError


def parameters_of(captured: Captured, node: fx.Node) -> tuple[str, ...]:
    """Canonical names of the parameters and buffers that a node reads, each once, in the same order on every rank."""
    module = captured.graph_module
    names = [str(v.target) for v in node.all_input_nodes if v.op == "get_attr"]
    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        names += [f"{node.target}.{n}" for n, _ in target.named_parameters(remove_duplicate=False)]
        names += [f"{node.target}.{n}" for n, _ in target.named_buffers(remove_duplicate=False)]
    return tuple(dict.fromkeys(captured.names[n] for n in names if n in captured.names))


def owners(captured: Captured, stage_of: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The stages that read each parameter and buffer, by canonical name; a tied one has several."""
    found: dict[str, set[int]] = {}
    for node in captured.nodes:
        for name in parameters_of(captured, node):
            found.setdefault(name, set()).add(stage_of[node.name])
    return {name: tuple(sorted(stages)) for name, stages in found.items()}


def with_unread(
    model: nn.Module, owned: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """Gives parameters and buffers that the planned graph does not read to the stage of their nearest relatives by
    name."""
    placed = dict(owned)
    rest = [n for n in dict.fromkeys(names.values()) if n not in placed]
    for name in rest:
        relatives = sorted(owned, key=lambda other: -_common_prefix(name, other))
        placed[name] = owned[relatives[0]][:1] if relatives else (0,)
    return placed


def follow(captured: Captured, owned: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """A placement in which every node stands with its parameters, and the others as early as their inputs allow.

    Raises:
        PlanError: the graph reads parameters in an order that the stages do not have.
    """
    nodes = captured.nodes
    stage_of: dict[str, int] = {}
    group_stage: dict[str, int] = {}
    changed = True
    while changed:
        changed = False
        for node in nodes:
            group = node.meta.get("group")
            earliest = max((stage_of.get(v.name, 0) for v in node.all_input_nodes), default=0)
            earliest = max(earliest, group_stage.get(group, 0) if group else 0, stage_of.get(node.name, 0))
            stage = _lowest_owner(node, earliest, [owned[n] for n in parameters_of(captured, node) if n in owned])
            if stage != stage_of.get(node.name):
                stage_of[node.name] = stage
                changed = True
            if group and stage > group_stage.get(group, 0):
                group_stage[group] = stage
                changed = True
    return stage_of


def _lowest_owner(node: fx.Node, earliest: int, owner_sets: Iterable[tuple[int, ...]]) -> int:
    """The first stage from `earliest` on that holds all the parameters of a node."""
    sets = list(owner_sets)
    if not sets:
        return earliest
    common = set(sets[0]).intersection(*sets[1:])
    allowed = sorted(s for s in common if s >= earliest)
    if not allowed:
        raise PlanError(
            f"node {node.name!r} reads parameters of stages {sorted(set().union(*sets))}, and its inputs come from "
            f"stage {earliest}",
            expected="parameters in the order in which the plan has placed them",
            where=str(node.meta.get("source", "")),
            remedy="give pipeline() an example that takes this path through the model, or keep these modules on one "
            "stage",
        )
    return allowed[0]


def _common_prefix(a: str, b: str) -> int:
    count = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        count += 1
    return count
