"""Give a Plan, a Timeline and the report of a run their `_repr_html_` for notebooks.

Plan and Timeline come before this package in the order of imports, so they cannot import the reports themselves.
"""

from __future__ import annotations

from typing import Self

from autopipe.plan import Plan
from autopipe.report.plans import plan_parts, plan_title
from autopipe.report.svg import timeline_svg
from autopipe.report.tables import Document, html_part, render
from autopipe.simulate import Timeline


class ReportText(str):
    """A report as plain text, which a notebook shows as tables."""

    _document: Document

    def __new__(cls, document: Document) -> Self:
        made = super().__new__(cls, render(document, "table"))
        made._document = document
        return made

    def __getnewargs__(self) -> tuple[Document]:  # type: ignore[override]
        return (self._document,)

    def _repr_html_(self) -> str:
        return document_html(self._document)


def document_html(document: Document) -> str:
    """A report as an HTML fragment: its title, tables and sentences."""
    return "\n".join(html_part(part) for part in (document.title, *document.parts))


def plan_html(plan: Plan) -> str:
    """A plan as an HTML fragment: its tables and the explanation."""
    return document_html(Document(title=plan_title(plan), parts=plan_parts(plan)))


def timeline_html(timeline: Timeline) -> str:
    """A timeline as an HTML fragment: its picture."""
    return timeline_svg(timeline)


def show_in_notebooks() -> None:
    """Give both classes their `_repr_html_`."""
    for shown, method in ((Plan, plan_html), (Timeline, timeline_html)):
        setattr(shown, "_repr_html_", method)  # noqa: B010
