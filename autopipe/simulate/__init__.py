"""Time and memory of a step, without devices.

A plan, or a schedule and its costs, becomes a `Timeline`; the planner calls the faster `step_time_us`. Read `play.py`
first.
"""

from autopipe.schedule.costs import Costs
from autopipe.simulate.bound import h_bound_us
from autopipe.simulate.plans import plan_costs, plan_schedule, simulate
from autopipe.simulate.play import simulate_schedule
from autopipe.simulate.reschedule import fastest_schedule, rank_peak_bytes, rescheduled, schedules_for
from autopipe.simulate.step_time import step_time_us
from autopipe.simulate.timeline import Event, Timeline

__all__ = [
    "Costs",
    "Event",
    "Timeline",
    "fastest_schedule",
    "h_bound_us",
    "plan_costs",
    "plan_schedule",
    "rank_peak_bytes",
    "rescheduled",
    "schedules_for",
    "simulate",
    "simulate_schedule",
    "step_time_us",
]
