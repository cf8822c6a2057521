"""The time of a step under the cost model: costs of the stages in, simulated microseconds out."""

from __future__ import annotations

from autopipe.cost import CostGraph, IntArray, StageCosts, stage_costs
from autopipe.simulate import step_time_us


def simulated_step_us(costs: StageCosts, num_microbatches: int, schedule: str = "1f1b") -> float:
    """Time from the first forward to the last backward of all micro-batches; the optimizer step is not in it."""
    forward, backward = costs.busy_us()
    return step_time_us(forward.tolist(), backward.tolist(), costs.links(), num_microbatches, schedule)


def step_us(graph: CostGraph, stage_of: IntArray, num_stages: int, num_microbatches: int, schedule: str) -> float:
    """Simulated time of a step under an assignment of nodes to stages."""
    return simulated_step_us(stage_costs(graph, stage_of, num_stages), num_microbatches, schedule)
