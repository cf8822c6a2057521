"""Write a plan as torchtitan's `module_fqns_per_model_part`: the module names of each stage.

Format: `ParallelismConfig` of https://github.com/pytorch/torchtitan, `torchtitan/distributed/pipeline_parallel.py`.
"""

from __future__ import annotations

import json

from autopipe.errors import PlanError
from autopipe.export.units import refuse_ties, units_of
from autopipe.plan import Plan
from autopipe.schedule.kinds import DEFAULT, KINDS


def torchtitan_modules(plan: Plan) -> str:
    """The module names of each stage as TOML lines for a torchtitan configuration.

    Modules without parameters stay on every stage, as torchtitan keeps what it does not name out of the model: name
    those that a stage needs yourself.

    Raises:
        PlanError: torchtitan cannot express the plan.
    """
    refuse_ties(plan, "torchtitan", "torchtitan moves whole modules, and its stages train a shared parameter apart")
    schedule = KINDS[plan.schedule].torchtitan
    if schedule is None:
        raise PlanError(
            f"schedule {plan.schedule!r}",
            expected=f"one that torchtitan has: {', '.join(k.name for k in KINDS.values() if k.torchtitan)}",
            where="export",
            remedy=f"plan with --schedule {DEFAULT}",
        )
    stages: list[list[str]] = [[] for _ in plan.stages]
    roots = {name for stage in plan.stages for name in stage.params if "." not in name}
    for unit in units_of(plan, "torchtitan"):
        if unit.name in roots:
            raise PlanError(
                f"parameter {unit.name!r} belongs to the model itself",
                expected="parameters of submodules, which torchtitan places by name",
                where="export",
                remedy="put it into a submodule of its own",
            )
        stages[unit.stage].append(unit.name)
    rows = "\n".join(f"    {json.dumps(names)},  # stage {i}" for i, names in enumerate(stages))
    return (
        f"# plan {plan.plan_hash}: {plan.num_stages} stages, {plan.num_microbatches} micro-batches of "
        f"{plan.microbatch_size}\n"
        "# modules that have parameters; add the names of parameterless modules that the forward calls\n"
        "[parallelism]\n"
        f"pipeline_parallel_degree = {plan.num_ranks or plan.num_stages}\n"
        f'pipeline_parallel_schedule = "{schedule}"\n'
        f"pipeline_parallel_microbatch_size = {plan.microbatch_size}\n"
        f"module_fqns_per_model_part = [\n{rows}\n]\n"
    )
