"""Reports for people: tables, pages, pictures and traces.

A plan, a profile, a timeline or the measured steps of a run become text, CSV, Markdown, HTML, SVG or a trace. Read
`tables.py` first, then `plans.py`.
"""

from autopipe.report.explain import explain
from autopipe.report.formats import plan_report
from autopipe.report.measured import load_measured, measured_report
from autopipe.report.notebook import show_in_notebooks
from autopipe.report.page import plan_page
from autopipe.report.perfetto import chrome_trace
from autopipe.report.profiles import profile_report
from autopipe.report.read_trace import read_trace
from autopipe.report.svg import timeline_svg
from autopipe.report.tables import FORMATS
from autopipe.report.timelines import timeline_report

__all__ = [
    "FORMATS",
    "chrome_trace",
    "explain",
    "load_measured",
    "measured_report",
    "plan_page",
    "plan_report",
    "profile_report",
    "read_trace",
    "timeline_report",
    "timeline_svg",
]

show_in_notebooks()
