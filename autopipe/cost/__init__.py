"""A profile and a link become a `CostGraph`: arrays of times, bytes and tensors, from which the cost of any stage
follows."""

from autopipe.cost.build import DEFAULT_LINK, build_cost_graph, param_names
from autopipe.cost.contraction import indivisible
from autopipe.cost.graph import CostGraph, FloatArray, IntArray, Readers, RecomputeOption, StageDevices, sum_by
from autopipe.cost.stages import StageCosts, crossings, stage_costs

__all__ = [
    "DEFAULT_LINK",
    "CostGraph",
    "FloatArray",
    "IntArray",
    "Readers",
    "RecomputeOption",
    "StageCosts",
    "StageDevices",
    "build_cost_graph",
    "crossings",
    "indivisible",
    "param_names",
    "stage_costs",
    "sum_by",
]
