"""Write a plan as Megatron-LM's `--pipeline-model-parallel-layout`, such as `Ettt|tttL`.

Format: https://docs.nvidia.com/megatron-core/developer-guide/latest/user-guide/features/pipeline_parallel_layout.html:
E the embedding, t a transformer layer, L the loss, | between stages.
"""

from __future__ import annotations

from collections import Counter

from autopipe.errors import PlanError
from autopipe.export.units import AT_MODULES, Unit, units_of
from autopipe.plan import Plan


def megatron_layout(plan: Plan) -> str:
    """The two arguments that tell Megatron-LM how many layers each stage has; its model must have the same layers.

    Raises:
        PlanError: the model is no stack of transformer layers, or the layout cannot express the cut.
    """
    units = units_of(plan, "megatron")
    layers = _stack(units)
    counts = Counter(unit.stage for unit in layers)
    first, last = layers[0].stage, layers[-1].stage
    for unit in units:
        if unit not in layers and not (unit.stage <= first or unit.stage >= last):
            raise PlanError(
                f"module {unit.name!r} on stage {unit.stage}, among the layers of {layers[0].list_name!r}",
                expected="other modules only before the first or after the last transformer layer",
                where="export",
                remedy=AT_MODULES,
            )
    _ends(plan, layers)
    stages = ["t" * counts[stage] for stage in range(plan.num_stages)]
    stages[0] = "E" + stages[0]
    stages[-1] += "L"
    ranks = plan.num_ranks or plan.num_stages
    return f'--pipeline-model-parallel-size {ranks}\n--pipeline-model-parallel-layout "{"|".join(stages)}"\n'


def _stack(units: list[Unit]) -> list[Unit]:
    """The one list of layers."""
    lists = Counter(unit.list_name for unit in units if unit.list_name is not None)
    if len(lists) != 1:
        have = f"{len(lists)} lists of layers ({', '.join(map(repr, sorted(lists)))})" if lists else "no list of layers"
        raise PlanError(
            f"a model with {have}",
            expected="one list of transformer layers, between embedding and head",
            where="export",
            remedy="export to torch, or run the plan with autopipe",
        )
    name = next(iter(lists))
    return [unit for unit in units if unit.list_name == name]


def _ends(plan: Plan, layers: list[Unit]) -> None:
    """Shared parameters may only be those of embedding and head, which Megatron ties itself."""
    for name, stages in plan.ties.items():
        ends = {0, plan.num_stages - 1}
        if len(set(stages)) > 1 and (set(stages) - ends or any(name.startswith(f"{u.name}.") for u in layers)):
            raise PlanError(
                f"parameter {name!r} is shared by stages {', '.join(map(str, sorted(set(stages))))}",
                expected="shared parameters of the embedding and the head alone",
                where="export",
                remedy="untie it, or export to torch",
            )
