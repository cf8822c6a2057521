"""Write a plan as a layer list with its boundaries for DeepSpeed's `PipelineModule`.

Format: https://deepspeed.readthedocs.io/en/latest/pipeline.html. `PipelineModule` chooses its boundaries in
`_partition_layers`, which is overridden here, because none of its methods takes them from the caller.
"""

from __future__ import annotations

from autopipe.errors import PlanError
from autopipe.export.units import refuse_ties, units_of
from autopipe.plan import Plan
from autopipe.schedule.kinds import DEFAULT, KINDS


def deepspeed_layers(plan: Plan) -> str:
    """Python text: the layers by name, the boundaries, and a PipelineModule that keeps to them.

    Raises:
        PlanError: DeepSpeed cannot express the plan.
    """
    refuse_ties(
        plan, "deepspeed", "a plan does not name the layer that reads it again, which a TiedLayerSpec would have to"
    )
    if not KINDS[plan.schedule].deepspeed:
        raise PlanError(
            f"schedule {plan.schedule!r}",
            expected=f"{DEFAULT}, the schedule of DeepSpeed's pipeline engine",
            where="export",
            remedy=f"plan with --schedule {DEFAULT}",
        )
    units = units_of(plan, "deepspeed")
    rows = "\n".join(f'    "{unit.name}",  # stage {unit.stage}' for unit in units)
    parts = [sum(unit.stage < stage for unit in units) for stage in range(plan.num_stages + 1)]
    return f'''"""Plan {plan.plan_hash} for DeepSpeed: {plan.num_stages} stages, gradient_accumulation_steps = {plan.num_microbatches}."""

from deepspeed.pipe import PipelineModule

# The modules that have parameters, in the order of the stages. DeepSpeed calls each with the output of the one before:
# what the model's own forward does between them (additions, reshapes, activations) has to stand in layers of the list
# too. A layer that you add moves the boundaries after it by one.
LAYERS = [
{rows}
]
PARTS = {parts}  # stage i runs LAYERS[PARTS[i]:PARTS[i + 1]]


class PlannedPipeline(PipelineModule):
    """A PipelineModule whose stages are those of the plan."""

    def _partition_layers(self, method="uniform"):
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = PARTS
        self._set_bounds(start=PARTS[stage], stop=PARTS[stage + 1])


def pipeline_module(model, loss_fn):
    """`model` in stages; call deepspeed.init_distributed() first."""
    layers = [model.get_submodule(name) for name in LAYERS]
    return PlannedPipeline(layers, num_stages={plan.num_stages}, loss_fn=loss_fn)
'''
