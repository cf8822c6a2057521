"""Steps that the commands share: capture and profile a model, plan a profile."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from autopipe.capture import capture
from autopipe.cli.models import Example, load_example
from autopipe.cli.options import CONSTRAINTS
from autopipe.cli.whatif import link_of
from autopipe.cluster import Cluster
from autopipe.cost import DEFAULT_LINK
from autopipe.engine.step.microbatch import MicroBatch, batch_size, split
from autopipe.errors import ConfigError
from autopipe.partition import Constraints, partition
from autopipe.partition.arguments import MICROBATCHES_PER_STAGE
from autopipe.plan import Plan
from profiler import accelerator, estimate, profile
from profiler.devices import DEVICES
from profiler.records import Profile
from profiler.scaling import known_device, scaled
from profiler.sizes import sizes_to_profile

DESCRIBED_BY_CLUSTER = ("memory_limit", "link_latency_us", "link_gbps", "overlap")


def profiled(options: argparse.Namespace) -> Profile:
    """The profile of the call's model, at the size of a micro-batch; the whole batch if no number of them is
    given."""
    example = load_example(options.model)
    microbatch = _microbatches(example, options.num_microbatches or 1)[0]
    if options.scaled_from is not None:
        return _scaled(options, example, microbatch)
    if options.from_device is not None:
        raise ConfigError(
            "--from-device without --from",
            expected="the profile to scale",
            where="the command line",
            remedy="add --from FILE",
        )
    return _measured(options, example, microbatch)


def _scaled(options: argparse.Namespace, example: Example, microbatch: MicroBatch) -> Profile:
    """A profile of another device, scaled to the one of the call."""
    if not _is_estimated(options.device):
        raise ConfigError(
            f"--from with --device {options.device}",
            expected=f"a device to scale to: {', '.join(d for d in DEVICES if d != 'cpu')}",
            where="the command line",
            remedy="name one of them",
        )
    before = Profile.load(options.scaled_from)
    source = options.from_device or known_device(before.device)
    if source not in DEVICES:
        raise ConfigError(
            f"--from-device {source}",
            expected=f"one of {', '.join(DEVICES)}",
            where="the command line",
            remedy="name the closest one",
        )
    target = options.device
    options.device = source
    here = _measured(options, example, microbatch, estimated=True)
    options.device = target
    return scaled(before, here, _measured(options, example, microbatch, estimated=True))


def planned(options: argparse.Namespace) -> Plan:
    """The plan of the call's model or profile; raises as `profiled_plan`."""
    return profiled_plan(options)[0]


def profiled_plan(options: argparse.Namespace) -> tuple[Plan, Profile]:
    """The plan of the call's model or profile, and the profile that it was made from.

    Raises:
        ConfigError: not exactly one of them is given, or no number of stages.
    """
    if (options.model is None) == (options.profile is None):
        raise ConfigError(
            "no model" if options.model is None else "a model and a profile",
            expected="one of MODEL and --profile FILE",
            where="the command line",
            remedy=f"see `autopipe {options.command} --help`",
        )
    if wants_search(options):
        profiles = _profiles(options)
        return searched(options, profiles), profiles[0]
    if options.num_stages is None:
        raise ConfigError(
            "no number of stages",
            expected="--num-stages K",
            where="the command line",
            remedy="give --num-stages, or --num-devices",
        )
    count = options.num_microbatches or MICROBATCHES_PER_STAGE * options.num_stages
    if options.profile is not None:
        measured = Profile.load(options.profile)
        return _partitioned(options, measured, count), measured
    example = load_example(options.model)
    microbatches = _microbatches(example, count)
    if options.num_microbatches and len(microbatches) < count and not options.quiet:
        print(f"note: a batch of {len(microbatches)} samples has no {count} micro-batches", file=sys.stderr)
    measured = _measured(options, example, microbatches[0])
    return _partitioned(options, measured, len(microbatches)), measured


def _profiles(options: argparse.Namespace) -> list[Profile]:
    """The profiles of a search: those of the call, or of its model at two micro-batch sizes."""
    if options.profile is not None:
        return [Profile.load(path) for path in options.profile.split(",")]
    example = load_example(options.model)
    batch = batch_size(example.args, example.kwargs, None)
    devices = options.num_devices or len(Cluster.load(options.cluster).devices)
    options.global_batch = options.global_batch or batch
    sizes = sizes_to_profile(min(batch, options.global_batch), devices)
    return [_measured(options, example, _microbatches(example, batch // size)[-1]) for size in sizes]


def _microbatches(example: Example, count: int) -> list[MicroBatch]:
    """The example batch in micro-batches, at most one for each sample."""
    return split(example.args, example.kwargs, None, count)


def _measured(
    options: argparse.Namespace, example: Example, microbatch: MicroBatch, *, estimated: bool = False
) -> Profile:
    captured = capture(example.model, microbatch.args, microbatch.kwargs)
    if captured.loss is not None:
        captured = captured.loss_only()  # what training runs: outputs other than the loss are not computed
    if captured.opaque and not options.quiet:
        print(captured.report(), file=sys.stderr)
    values = captured.flatten(microbatch.args, microbatch.kwargs)
    graph, names, graph_hash = captured.graph_module, captured.names, captured.graph_hash
    if estimated or _is_estimated(options.device):
        return estimate(graph, values, device=options.device, names=names, graph_hash=graph_hash)
    budget = getattr(options, "budget_s", None)
    asked = {} if budget is None else {"budget_s": budget}
    return profile(
        graph, values, device=options.device, progress=not options.quiet, names=names, graph_hash=graph_hash, **asked
    )


def _is_estimated(device: str | None) -> bool:
    """Return whether the device is the name of a product, whose times are estimated wherever the command runs."""
    return device in DEVICES and device != "cpu"


def _partitioned(options: argparse.Namespace, measured: Profile, num_microbatches: int) -> Plan:
    asked = {
        "schedule": options.schedule,
        "data_parallel": options.data_parallel,
        "objective": options.objective,
        "time_budget_s": options.time_budget_s,
        "split_points": options.split_points,
        "recompute": options.recompute,
        "constraints": Constraints(**{kind: getattr(options, kind) or () for kind in CONSTRAINTS}),
    }
    return partition(
        measured,
        num_stages=options.num_stages,
        num_microbatches=num_microbatches,
        link=link_of(measured.link or DEFAULT_LINK, options),
        memory_limit=options.memory_limit or _device_memory_bytes(options),
        **{name: value for name, value in asked.items() if value is not None},
    )


def _device_memory_bytes(options: argparse.Namespace) -> int | None:
    """The memory of the GPU that was measured or estimated; None on a CPU, and for a profile from a file."""
    if options.model is not None and _is_estimated(options.device):
        return DEVICES[options.device].memory_bytes
    if options.model is None or options.device is None:
        return None
    device = torch.device(options.device)
    return accelerator.memory_bytes(device) if accelerator.is_accelerator(device) else None


def wants_search(options: argparse.Namespace) -> bool:
    """Return whether the call gives devices instead of a number of stages."""
    return options.num_devices is not None or options.cluster is not None


def searched(options: argparse.Namespace, profiles: list[Profile]) -> Plan:
    """The best plan for the devices of the call.

    Raises:
        ConfigError: a cluster, and flags that describe one.
    """
    cluster = None if options.cluster is None else Cluster.load(options.cluster)
    described = [name for name in DESCRIBED_BY_CLUSTER if getattr(options, name) is not None]
    if cluster is not None and described:
        raise ConfigError(
            f"--{described[0].replace('_', '-')} with --cluster",
            expected="links and memory in the cluster file",
            where="the command line",
            remedy="leave it out, or write it into the file",
        )
    first = min(profiles, key=lambda p: p.microbatch_size)
    names = ("num_stages", "num_microbatches", "data_parallel", "schedule", "objective", "split_points", "recompute")
    asked: dict[str, Any] = {name: getattr(options, name) for name in (*names, "time_budget_s", "global_batch")}
    if cluster is None:
        asked |= {"link": link_of(first.link or DEFAULT_LINK, options), "memory_limit": options.memory_limit}
    return partition(
        profiles,
        num_devices=options.num_devices,
        cluster=cluster,
        constraints=Constraints(**{kind: getattr(options, kind) or () for kind in CONSTRAINTS}),
        **{name: value for name, value in asked.items() if value is not None},
    )
