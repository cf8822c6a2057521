"""A profile becomes a plan: the graph is cut into stages that are balanced, fit into memory, and send each other little."""

from autopipe.partition.constraints import Constraints
from autopipe.partition.devices import partition

__all__ = ["Constraints", "partition"]
