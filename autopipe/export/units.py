"""List the modules that other frameworks place whole, each with its stage."""

from __future__ import annotations

from dataclasses import dataclass

from autopipe.errors import PlanError
from autopipe.plan import Plan

AT_MODULES = (
    "plan at module boundaries: `autopipe plan ... --split-points MODULE,...`, or split_points= of autopipe.pipeline()"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A module that is placed whole: an element of a list of layers, or a module outside such lists."""

    name: str
    stage: int

    @property
    def list_name(self) -> str | None:
        """The list of layers whose element it is."""
        parent, _, last = self.name.rpartition(".")
        return parent if last.isdigit() else None


def units_of(plan: Plan, target: str) -> list[Unit]:
    """The units that have parameters, in the order of the stages.

    Raises:
        PlanError: a stage ends inside of a unit, a tensor skips stages, or several cross: `target` runs one module
            after another.
    """
    names = [name for stage in plan.stages for name in stage.params]
    lists = {_element(name) for name in names} - {None}
    found: dict[str, int] = {}
    for stage in plan.stages:
        for name in stage.params:
            if name in plan.ties and len(set(plan.ties[name])) > 1:
                continue
            unit = _element(name) or _outside(name, lists)
            if found.setdefault(unit, stage.index) != stage.index:
                raise PlanError(
                    f"module {unit!r} is cut: it has parameters on stages {found[unit]} and {stage.index}",
                    expected=f"whole modules, which is all that {target} can place",
                    where="export",
                    remedy=AT_MODULES,
                )
    _chain_only(plan, target)
    return [Unit(name=name, stage=stage) for name, stage in found.items()]


def refuse_ties(plan: Plan, target: str, why: str) -> None:
    """Raise a PlanError if stages share a parameter."""
    for name, stages in plan.ties.items():
        if len(set(stages)) > 1:
            raise PlanError(
                f"parameter {name!r} is shared by stages {', '.join(map(str, sorted(set(stages))))}",
                expected=f"no shared parameters: {why}",
                where="export",
                remedy="untie it in the model and plan again, or export to torch, whose stages sum the gradients of "
                "shared parameters",
            )


def _element(parameter: str) -> str | None:
    """The element of a list of layers that a parameter belongs to: up to the first number in its name."""
    parts = parameter.split(".")[:-1]
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])


def _outside(parameter: str, elements: set[str | None]) -> str:
    """The outermost module that has the parameter and no list of layers; the parameter itself if the root holds
    it."""
    parts = parameter.split(".")[:-1] or [parameter]
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        if not any(element and element.startswith(f"{name}.") for element in elements):
            return name
    return parameter


def _chain_only(plan: Plan, target: str) -> None:
    for transfer in plan.transfers:
        if transfer.target != transfer.source + 1:
            raise PlanError(
                f"{', '.join(transfer.nodes)} skip{'s' if len(transfer.nodes) == 1 else ''} from stage "
                f"{transfer.source} "
                f"to stage {transfer.target}",
                expected=f"stages that read from the stage before alone, as {target} runs them",
                where="export",
                remedy="export to torch, whose stages pass such tensors on, or run the plan with autopipe",
            )
        if len(transfer.nodes) > 1:
            raise PlanError(
                f"{len(transfer.nodes)} tensors cross from stage {transfer.source} to stage {transfer.target}: "
                f"{', '.join(transfer.nodes[:4])}",
                expected=f"one tensor between stages, as {target} sends it",
                where="export",
                remedy=AT_MODULES,
            )
