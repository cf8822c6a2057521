"""Report of a verification: the verdict, the worst parameters, and what was compared and how."""

from __future__ import annotations

import dataclasses
import json
import math

from autopipe.report.tables import Cell, Column, Document, Table, render
from autopipe.verify.compare import Difference, Verification

SHOWN = 10
COLUMNS = (
    Column(name="what"),
    Column(name="name"),
    Column(name="stage"),
    Column(name="relative error"),
    Column(name="allowed"),
    Column(name="verdict"),
)


def verification_report(found: Verification, format: str = "table") -> str:
    """The report as `table`, `json` or `csv` (every comparison), `md` or `html`.

    Raises:
        ConfigError: an unknown format.
    """
    if format == "json":
        data = {**dataclasses.asdict(found), "equal": found.equal}
        for row in data["differences"]:
            row["error"] = row["error"] if math.isfinite(row["error"]) else None  # JSON has no infinity
        return json.dumps(data, indent=1) + "\n"
    shown = found.differences if format == "csv" else found.differences[: max(SHOWN, len(found.faults[:50]))]
    worst = "worst " if len(shown) < len(found.differences) else ""
    title = f"The {worst}{len(shown)} of {len(found.differences)} comparisons"
    table = Table(title=title, columns=COLUMNS, rows=tuple(_row(d) for d in shown))
    return render(Document(title=_verdict(found), parts=(_facts(found), table)), format)


def _verdict(found: Verification) -> str:
    if found.equal:
        return f"Equal: a pipeline of {found.num_stages} stages computes what the plain model computes"
    worst = found.faults[0]
    counts = f"{len(found.faults)} of {len(found.differences)} comparisons differ"
    return f"Fault: {counts}, the worst is {worst.kind} {worst.name}"


def _facts(found: Verification) -> str:
    counts = {kind: sum(d.kind == kind for d in found.differences) for kind in ("gradient", "buffer")}
    lines = [
        f"loss {found.loss:.7g} in the pipeline, {found.plain_loss:.7g} in the plain model",
        f"{found.num_microbatches} micro-batches; {counts['gradient']} gradients and {counts['buffer']} buffers "
        "compared "
        "(a parameter of several stages on each)",
    ]
    if found.surrogate:
        lines.append("the model gives no loss: a fixed one on its floating outputs was used")
    if found.without_dropout:
        lines.append("the model draws random numbers: compared with dropout off")
    if found.num_unsaved_buffers:
        lines.append(f"{found.num_unsaved_buffers} buffers outside of the state dict were not compared")
    return "\n".join(lines)


def _row(d: Difference) -> tuple[Cell, ...]:
    verdict = "equal" if d.equal else "FAULT"
    stage = str(d.stage) if d.stage >= 0 else "-"
    return (d.kind, d.name, stage, d.remark or f"{d.error:.1e}", f"{d.tolerance:.0e}", verdict)
