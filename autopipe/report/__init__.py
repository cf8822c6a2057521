"""What people see: tables of a plan, a profile and a timeline, an explanation, and the timeline as a trace and as a picture."""

from autopipe.report.explain import explain
from autopipe.report.plans import plan_report
from autopipe.report.profiles import profile_report
from autopipe.report.svg import timeline_svg
from autopipe.report.tables import FORMATS
from autopipe.report.timelines import timeline_report
from autopipe.report.trace import chrome_trace

__all__ = [
    "FORMATS",
    "chrome_trace",
    "explain",
    "plan_report",
    "profile_report",
    "timeline_report",
    "timeline_svg",
]
