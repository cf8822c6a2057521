"""Schedules as data.

A kind of schedule, a stage graph and `Costs` become a `Schedule`: a list of actions for each rank, which is checked,
simulated, drawn and executed. Read `actions.py` first, then `kinds.py` and `build.py`.
"""

from autopipe.schedule.actions import Action, Edge, Schedule
from autopipe.schedule.build import build_schedule
from autopipe.schedule.check import check_schedule
from autopipe.schedule.costs import Costs

__all__ = ["Action", "Costs", "Edge", "Schedule", "build_schedule", "check_schedule"]
