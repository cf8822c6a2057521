"""Measurements of the last training steps, gathered from all ranks: the report and the trace of an engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from autopipe.engine.ranks.context import Context
from autopipe.engine.setup.prepared import Prepared
from autopipe.engine.step.step_stats import Measurements, merge_timelines, transfer_times_us
from autopipe.report import chrome_trace
from autopipe.report.measured import measured_report
from autopipe.simulate import Timeline


def report(prepared: Prepared, measured: Measurements, format: str) -> str:
    """The plan with what the last training steps took, stage by stage. Collective."""
    context = prepared.peers.context
    first = prepared.peers.mesh.shape.replicas[0]
    ranks = context.gather(measured.summaries(context.device, prepared.held_bytes()))
    last = context.gather(measured.last_step())
    steps = [last[rank] for rank in first]
    transfers = transfer_times_us(steps)
    stages = [dataclasses.replace(s, transfer_us=transfers.get(s.index, 0.0)) for rank in first for s in ranks[rank]]
    timeline = merge_timelines(steps) if stages else None
    return measured_report(prepared.plan, sorted(stages, key=lambda s: s.index), format, timeline=timeline)


def last_step(context: Context, measured: Measurements) -> Timeline:
    """The last training step of all ranks on one clock. Collective."""
    return merge_timelines(context.gather(measured.last_step()))


def write_trace(path: str | Path, context: Context, measured: Measurements) -> None:
    """Write the last training step as a trace for Perfetto, on rank 0. Collective."""
    timeline = last_step(context, measured)
    if context.rank == 0:
        Path(path).write_text(json.dumps(chrome_trace(timeline)))
