"""A profile becomes a plan: the graph is cut into stages that are balanced, fit into memory, and send each other
little."""

from autopipe.partition.api import partition
from autopipe.partition.constraints import Constraints

__all__ = ["Constraints", "partition"]
