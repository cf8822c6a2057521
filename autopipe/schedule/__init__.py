"""A schedule as data: for each rank a list of actions, which is made, checked, simulated, drawn and executed."""

from autopipe.schedule.actions import Action, Edge, Schedule
from autopipe.schedule.build import build_schedule
from autopipe.schedule.check import check_schedule
from autopipe.schedule.costs import Costs

__all__ = ["Action", "Costs", "Edge", "Schedule", "build_schedule", "check_schedule"]
