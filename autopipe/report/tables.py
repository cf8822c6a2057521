"""Render tables and sentences as text, CSV, Markdown or HTML; JSON is each report's own, in bytes and microseconds."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tabulate import tabulate

from autopipe.errors import ConfigError

Format = Literal["table", "json", "csv", "md", "html"]
FORMATS: tuple[str, ...] = get_args(Format)
SMALL_MIB = 10.0
Cell = str | int | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column: its head, and how many decimals its numbers have where people read them."""

    name: str
    decimals: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table: cells are words and raw numbers; None is a figure that does not exist."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Content of a report, whatever its format: a title, then tables and sentences in turn."""

    title: str
    parts: tuple[Table | str, ...]


def readable(table: Table) -> Table:
    """The table without columns in which nothing exists, and with one decimal more where all sizes in MiB are small."""
    kept = [i for i, _ in enumerate(table.columns) if any(row[i] is not None for row in table.rows)] or [0]
    columns = []
    for column, cells in ((table.columns[i], [row[i] for row in table.rows]) for i in kept):
        numbers = [abs(cell) for cell in cells if isinstance(cell, float)]
        small = column.name.endswith("MiB") and numbers and max(numbers) < SMALL_MIB
        columns.append(dataclasses.replace(column, decimals=max(column.decimals, 2)) if small else column)
    return Table(
        title=table.title, columns=tuple(columns), rows=tuple(tuple(row[i] for i in kept) for row in table.rows)
    )


def render(document: Document, format: str) -> str:
    """The document as `table` (plain text), `csv` (its first table, numbers unrounded), `md` or `html` (one file, no
    network).

    Raises:
        ConfigError: an unknown format.
    """
    match format:
        case "table":
            return _text(document)
        case "csv":
            return _csv(next(part for part in document.parts if isinstance(part, Table)))
        case "md":
            return _markdown(document)
        case "html":
            return page(document.title, "\n".join(html_part(part) for part in document.parts))
    raise ConfigError(
        f"format {format!r}", expected=f"one of {', '.join(FORMATS)}", where="--format", remedy="use one of these"
    )


def shown(cell: Cell, decimals: int) -> str:
    """A cell as people read it."""
    if cell is None:
        return "-"
    if isinstance(cell, float) or (isinstance(cell, int) and decimals):
        return f"{cell:,.{decimals}f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _body(table: Table) -> list[list[str]]:
    return [[shown(c, column.decimals) for c, column in zip(row, table.columns, strict=True)] for row in table.rows]


def _align(table: Table) -> list[str]:
    """Align words to the left and numbers to the right."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    return ["left" if any(isinstance(cell, str) for cell in column) else "right" for column in columns]


def _tabulated(table: Table, style: str, heads: Sequence[str]) -> str:
    align = _align(table)
    text = tabulate(
        _body(table), headers=heads, tablefmt=style, colalign=align if table.rows else None, disable_numparse=True
    )
    return str(text)


def _text(document: Document) -> str:
    blocks = [document.title]
    for part in document.parts:
        if isinstance(part, str):
            blocks.append(part)
        else:
            heads = [column.name.replace(" ", "\n", 1) for column in part.columns]
            blocks.append((f"{part.title}\n" if part.title else "") + _tabulated(part, "simple", heads))
    return "\n\n".join(blocks) + "\n"


def _markdown(document: Document) -> str:
    blocks = [f"# {document.title}"]
    for part in document.parts:
        if isinstance(part, str):
            blocks.append(part)
        else:
            escaped = Table(
                title=part.title,
                columns=part.columns,
                rows=tuple(tuple(c.replace("|", "\\|") if isinstance(c, str) else c for c in row) for row in part.rows),
            )
            text = _tabulated(escaped, "pipe", [column.name for column in part.columns])
            blocks.append((f"## {part.title}\n\n" if part.title else "") + text)
    return "\n\n".join(blocks) + "\n"


def _csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.name for column in table.columns])
    writer.writerows(["" if cell is None else cell for cell in row] for row in table.rows)
    return out.getvalue()


def html_part(part: Table | str) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    title = f"<h2>{html.escape(part.title)}</h2>\n" if part.title else ""
    return f'{title}<div class="table">{_tabulated(part, "html", [column.name for column in part.columns])}</div>'


def page(title: str, body: str) -> str:
    """A self-contained HTML page, light and dark."""
    return PAGE.replace("{title}", html.escape(title)).replace("{body}", body)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p { white-space: pre-line; max-width: 60rem; }
.table, .figure { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); white-space: pre; }
th { vertical-align: bottom; }
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
