"""Options of the command line, and the parsers of their values."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, NoReturn

from autopipe.plan import RECOMPUTE
from autopipe.report import FORMATS
from autopipe.report.timelines import TIMELINE_FORMATS
from autopipe.schedule.kinds import DEFAULT, KINDS, PLANNED, TRAINING, dealt_over_ranks
from profiler import accelerator

PLAYED = tuple(name for name in TRAINING if not KINDS[name].several_stages_a_rank)
"""Schedules that `simulate` can play on any plan: they need one rank for each stage, as plans have."""
EXPORTS = ("torch", "torchtitan", "deepspeed", "megatron")
CONVERSIONS = ("safetensors", "torch", "checkpoint")
OBJECTIVES = ("step", "bottleneck")
CONSTRAINTS = ("together", "alone", "first", "last")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a wrong call in one line, like all errors."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        line = f"autopipe: error: {message}; remedy: see `{self.prog} --help`"
        print(line, file=sys.stderr)
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The parser of `autopipe`."""
    top = Parser(prog="autopipe", description="Profiles, plans and simulates pipeline parallelism for a PyTorch model.")
    commands = top.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    _add_commands(commands)
    return top


def _add_commands(commands: Any) -> None:
    shown = commands.add_parser("profile", help="measure a model node by node and stop")
    _model(shown, required=True)
    _run(shown, measured=True)
    shown.add_argument(
        "--nodes", action="store_true", help="show every node, slowest first, instead of the module tree"
    )
    shown.add_argument(
        "--from", dest="scaled_from", metavar="FILE", help="scale this profile, of another device, to the --device"
    )
    shown.add_argument("--from-device", metavar="DEVICE", help="the published device that its device is closest to")
    shown.add_argument("--budget-s", type=_number, metavar="S", help="seconds of repeating measurements (default: 60)")
    _output(shown, FORMATS, "write the profile as JSON to FILE")
    plan = commands.add_parser("plan", help="cut a model or a profile into stages")
    report = commands.add_parser("report", help="show what a plan costs, stage by stage, and the usual splits")
    simulate = commands.add_parser("simulate", help="play a step of a plan: timeline, bubble and memory of each rank")
    for command in (plan, report, simulate):
        _model(command, required=False)
        command.add_argument(
            "--profile",
            metavar="FILE",
            help="a profile, instead of a model; for --num-devices several of other micro-batch sizes: FILE,FILE",
        )
        _run(command, measured=True)
        _planning(command, PLANNED if command is not simulate else PLAYED)
    for command in (report, simulate):
        command.add_argument(
            "--plan", metavar="FILE", help="a plan, instead of a model; PLAN.json alone means the same"
        )
    report.add_argument("--measured", metavar="FILE", help="the report of a run as JSON, instead of a model")
    report.add_argument("--trace", metavar="FILE", help="with --measured: the trace of the run, for the page")
    _output(plan, FORMATS, "write the plan as JSON to FILE")
    _output(report, FORMATS, "write the report to FILE; its suffix chooses the format if none is given")
    _output(
        simulate,
        TIMELINE_FORMATS,
        "write to FILE; .svg, .html, .csv and .md choose the format, .json a trace for Perfetto",
    )
    verify = commands.add_parser(
        "verify", help="run a step as a pipeline of local processes and compare it with the plain model"
    )
    _model(verify, required=True)
    _verification(verify)
    _output(verify, FORMATS, "write the comparison to FILE; its suffix chooses the format if none is given")
    _add_others(commands)


def _add_others(commands: Any) -> None:
    export = commands.add_parser("export", help="write a plan in another framework's format")
    export.add_argument("plan", metavar="PLAN", help="a plan, as `autopipe plan -o FILE` writes it")
    export.add_argument("--to", choices=EXPORTS, required=True, help="the framework; torch needs --model")
    export.add_argument("--model", metavar="MODEL", help="for torch: the model that was planned")
    _output(export, ("table",), "write to FILE")
    convert = commands.add_parser("convert", help="a checkpoint to weights that the plain model loads, or back")
    convert.add_argument("source", metavar="CHECKPOINT", help="a checkpoint, or weights: a file, an index or a folder")
    convert.add_argument("out", metavar="OUT", help="*.safetensors or *.pt: one file; otherwise a folder")
    convert.add_argument("--to", choices=CONVERSIONS, help="what to write, if OUT does not say it")
    convert.add_argument(
        "--max-shard-size", type=_bytes, metavar="SIZE", help="size of a safetensors file in a folder (default: 5GB)"
    )
    convert.add_argument(
        "--names", metavar="FILE", help="for a checkpoint of DeepSpeed: JSON, the module of each layer's number"
    )
    convert.add_argument("--quiet", action="store_true", help="nothing on stdout")
    convert.add_argument("--debug", action="store_true", help="on an error, print the traceback too")
    env = commands.add_parser("env", help="versions, devices and backends, for a bug report")
    _output(env, ("table", "json"), "write to FILE")


def _model(command: argparse.ArgumentParser, *, required: bool) -> None:
    command.add_argument(
        "model",
        nargs=None if required else "?",
        metavar="MODEL",
        help="package.module:factory or file.py:factory; the factory returns (model, example_args) or "
        "(model, example_args, example_kwargs), with a whole batch as the example",
    )


def _run(command: argparse.ArgumentParser, *, measured: bool) -> None:
    command.add_argument(
        "--num-microbatches", type=_count, metavar="M", help="micro-batches that a batch is split into"
    )
    if measured:
        command.add_argument(
            "--device",
            metavar="DEVICE",
            help=f"where to measure: cpu, {accelerator.EXAMPLES}; or what to estimate: h100, h200, a100, l40s, mi300x",
        )


def _planning(command: argparse.ArgumentParser, schedules: tuple[str, ...]) -> None:
    add = command.add_argument
    add("--num-stages", type=_count, metavar="K", help="stages of the pipeline, one for each device of a replica")
    add("--num-devices", type=_count, metavar="N", help="devices, instead of stages: stages and replicas are searched")
    add("--cluster", metavar="FILE", help="devices and links, instead of --link-* and --memory-limit")
    add("--global-batch", type=_count, metavar="B", help="samples of a step over all replicas, if devices are given")
    add("--schedule", choices=schedules, help="order of forwards and backwards (default: 1f1b)")
    add("--data-parallel", type=_count, metavar="N", help="replicas of the pipeline (default: 1)")
    add("--memory-limit", type=_bytes, metavar="SIZE", help="memory of each device, such as 24GiB or 800MB")
    add(
        "--recompute", choices=RECOMPUTE, help="activations computed again in the backward (default: as memory demands)"
    )
    add("--link-latency-us", type=_number, metavar="US", help="time of an empty message between stages")
    add("--link-gbps", type=_positive, metavar="GBPS", help="bandwidth between stages, in gigabits per second")
    add("--overlap", type=_share, metavar="SHARE", help="share of a transfer that compute hides, from 0 to 1")
    add("--objective", choices=OBJECTIVES, help="what the plan makes small: the step, or the load of the slowest stage")
    add("--split-points", type=_names, metavar="A,B", help="modules at which a new stage begins, instead of a search")
    add(
        "--together",
        type=_names,
        action="append",
        metavar="A,B",
        help="modules that stay on one stage; may be repeated",
    )
    add("--alone", type=_names, metavar="A,B", help="modules that are each a stage of their own")
    add("--first", type=_names, metavar="A,B", help="modules on the first stage")
    add("--last", type=_names, metavar="A,B", help="modules on the last stage")
    add("--time-budget-s", type=_number, metavar="S", help="seconds of search for the best plan")


def _verification(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--num-stages",
        type=_count,
        metavar="K",
        required=True,
        help="stages, each on a gloo process of this machine",
    )
    add("--num-microbatches", type=_count, metavar="M", help="micro-batches of the batch (default: 2 for each stage)")
    add(
        "--schedule",
        choices=TRAINING,
        default=DEFAULT,
        help=f"order of forwards and backwards (default: {DEFAULT}); {dealt_over_ranks()} runs two stages on each "
        "process",
    )
    add(
        "--tolerance", type=_number, metavar="ERROR", help="relative error that counts as equal (default: 1e-5 in fp32)"
    )
    add("--timeout-s", type=_positive, metavar="S", default=300.0, help="seconds for the processes (default: 300)")


def _output(command: argparse.ArgumentParser, formats: tuple[str, ...], help: str) -> None:
    command.add_argument("--format", choices=formats, help="how to write it (default: table)")
    command.add_argument("-o", "--output", metavar="FILE", help=help)
    command.add_argument("--quiet", action="store_true", help="no progress bars and nothing on stdout; -o still writes")
    command.add_argument("--debug", action="store_true", help="on an error, print the traceback too")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of module names, such as layers.4,layers.8")
    return names


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _positive(text: str) -> float:
    if _number(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return float(text)


def _share(text: str) -> float:
    if _number(text) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return float(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    size = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, such as 24GiB or 800MB")
    return size
