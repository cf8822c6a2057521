"""One function for each command; each writes its result to stdout or a file."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from autopipe.cli.whatif import changed
from autopipe.errors import ConfigError
from autopipe.plan import Plan
from autopipe.report import (
    load_measured,
    measured_report,
    plan_report,
    profile_report,
    read_trace,
    timeline_report,
)
from autopipe.schedule.kinds import PLANNED
from autopipe.simulate import simulate
from profiler.records import Profile

DONE, FAULT, WRONG_CALL = 0, 1, 2
SUFFIXES = {".json": "json", ".csv": "csv", ".md": "md", ".html": "html"}
TIMELINE_SUFFIXES = {**SUFFIXES, ".json": "trace", ".svg": "svg"}


def profile_command(options: argparse.Namespace) -> None:
    """`autopipe profile MODEL`: measures and stops."""
    from autopipe.cli.steps import profiled  # here and below: torch is loaded only by the commands that need it

    profile = profiled(options)
    _save(options, profile_report(profile, "json"))
    _show(options, profile_report(profile, options.format or "table", nodes=options.nodes))


def plan_command(options: argparse.Namespace) -> None:
    """`autopipe plan MODEL | --profile FILE`: the plan."""
    from autopipe.cli.steps import planned

    plan = planned(options)
    _save(options, plan_report(plan, "json"))
    _show(options, plan_report(plan, options.format or "table"))


def report_command(options: argparse.Namespace) -> None:
    """`autopipe report MODEL | --plan FILE | --profile FILE | --measured FILE`: the plan and what it costs, or cost in
    a run."""
    format = _format(options, SUFFIXES)
    if options.measured is not None:
        _write(options, _measured(options, format))
    elif options.trace is not None:
        raise ConfigError(
            "--trace without --measured",
            expected="--measured with the report of the same run",
            where="the command line",
            remedy="add --measured FILE, which engine.report('json') gives",
        )
    elif options.plan is None and options.profile is None and ":" in (options.model or ""):
        from autopipe.cli.steps import profiled_plan

        plan, measured = profiled_plan(options)
        _write(options, plan_report(plan, format, profile=measured))
    else:
        profile = Profile.load(options.profile) if options.profile is not None and options.plan is None else None
        _write(options, plan_report(_plan(options), format, profile=profile))


def _measured(options: argparse.Namespace, format: str) -> str:
    """The report of a run from its files."""
    if any(v is not None for v in (options.model, options.plan, options.profile)):
        raise ConfigError(
            "--measured and a model, plan or profile",
            expected="--measured alone: it contains its plan",
            where="the command line",
            remedy="leave the others out",
        )
    plan, measured = load_measured(options.measured)
    return measured_report(plan, measured, format, timeline=read_trace(options.trace) if options.trace else None)


def simulate_command(options: argparse.Namespace) -> None:
    """`autopipe simulate MODEL | --plan FILE | --profile FILE`: the timeline of a step.

    On a plan, the number of micro-batches, the schedule and the link are changed without planning again.
    """
    only_played = None if options.schedule in PLANNED else options.schedule
    if only_played:
        options.schedule = None
    plan = _plan(options)
    timeline = simulate(plan, schedule=only_played)
    title = (
        f"{plan.num_stages} stages, {plan.num_microbatches} micro-batches of {plan.microbatch_size} samples, "
        f"{only_played or plan.schedule}, on {plan.device}{' (estimated costs)' if plan.estimated else ''}"
    )
    _write(options, timeline_report(timeline, _format(options, TIMELINE_SUFFIXES), title=title))


def verify_command(options: argparse.Namespace) -> int:
    """`autopipe verify MODEL --num-stages K`: compare a pipeline of local processes with the plain model; 1 if they
    differ."""
    from autopipe.cli.models import load_parts
    from autopipe.verify import verification_report, verify

    found = verify(
        functools.partial(load_parts, options.model),
        num_stages=options.num_stages,
        num_microbatches=options.num_microbatches or 2 * options.num_stages,
        schedule=options.schedule,
        tolerance=options.tolerance,
        timeout_s=options.timeout_s,
    )
    _write(options, verification_report(found, _format(options, SUFFIXES)))
    return DONE if found.equal else FAULT


def export_command(options: argparse.Namespace) -> None:
    """`autopipe export PLAN --to FRAMEWORK`: the cut in another framework's format."""
    from autopipe.export import export

    _write(options, export(Plan.load(options.plan), options.to, options.model))


def convert_command(options: argparse.Namespace) -> None:
    """`autopipe convert CHECKPOINT OUT`: weights from a checkpoint, or a checkpoint from weights."""
    from autopipe.checkpoint import MAX_SHARD_BYTES, convert

    written = convert(
        options.source,
        options.out,
        to=options.to,
        max_shard_bytes=options.max_shard_size or MAX_SHARD_BYTES,
        names=options.names,
    )
    _show(options, "".join(f"{path}\n" for path in written))


def env_command(options: argparse.Namespace) -> None:
    """`autopipe env`: versions, devices, backends and cores."""
    from autopipe.cli.environment import environment_report

    _write(options, environment_report(_format(options, SUFFIXES)))


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "profile": profile_command,
    "plan": plan_command,
    "report": report_command,
    "simulate": simulate_command,
    "verify": verify_command,
    "export": export_command,
    "convert": convert_command,
    "env": env_command,
}


def _plan(options: argparse.Namespace) -> Plan:
    """The plan of the call: from its file, with what the call changes, or made now."""
    if options.plan is None and options.model is not None and options.model.endswith(".json"):
        options.plan, options.model = options.model, None
    if options.plan is None:
        from autopipe.cli.steps import planned

        return planned(options)
    if options.model is not None or options.profile is not None:
        raise ConfigError(
            "a plan and a model or profile",
            expected="one of MODEL, --profile FILE and --plan FILE",
            where="the command line",
            remedy="leave --plan out to plan again",
        )
    return changed(Plan.load(options.plan), options)


def _format(options: argparse.Namespace, suffixes: dict[str, str]) -> str:
    """The format that was asked for, else that of the file's suffix, else a table."""
    suffix = Path(options.output).suffix.lower() if options.output else ""
    return str(options.format or suffixes.get(suffix, "table"))


def _write(options: argparse.Namespace, text: str) -> None:
    """Write to the file, or to stdout if none is named."""
    if options.output:
        _save(options, text)
    elif not options.quiet:
        sys.stdout.write(text)


def _show(options: argparse.Namespace, text: str) -> None:
    if not options.quiet:
        sys.stdout.write(text)


def _save(options: argparse.Namespace, text: str) -> None:
    if not options.output:
        return
    try:
        Path(options.output).write_text(text)
    except OSError as cause:
        raise ConfigError(
            f"cannot write {options.output!r}: {cause.strerror}",
            where="-o",
            remedy="name a file in a directory that exists and can be written",
        ) from None
    if not options.quiet:
        print(f"wrote {options.output}", file=sys.stderr)
