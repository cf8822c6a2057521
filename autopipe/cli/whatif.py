"""Apply the options of a call to an existing plan, with its cuts as they are."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from autopipe.cli.options import CONSTRAINTS
from autopipe.cluster import Cluster
from autopipe.errors import ConfigError
from autopipe.partition.cluster.device_layouts import on_cluster
from autopipe.plan import Plan
from autopipe.simulate import simulate
from autopipe.simulate.reschedule import bubble_of
from autopipe.units import BYTES_PER_US_OF_A_GBPS
from profiler.records import LinkProfile


def changed(plan: Plan, options: argparse.Namespace) -> Plan:
    """A plan with the call's micro-batches, schedule, replicas, link and memory limit, its cuts as they are.

    What follows from them by simulation (step time and bubble) is computed again; bounds and usual splits, which would
    need the profile, are left out if the costs changed.

    Raises:
        ConfigError: the call asks for a change that only planning again can make.
    """
    for name in (
        "num_stages",
        "objective",
        "time_budget_s",
        "split_points",
        "recompute",
        "device",
        "num_devices",
        "global_batch",
        *CONSTRAINTS,
    ):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} with --plan",
                expected="options that keep the cuts",
                where="the command line",
                remedy="plan again from the model or with --profile FILE",
            )
    if options.cluster is not None:
        plan = _on_cluster(plan, options)
    asked: dict[str, Any] = {
        "num_microbatches": options.num_microbatches,
        "schedule": options.schedule,
        "data_parallel": options.data_parallel,
        "memory_limit_bytes": options.memory_limit,
        "link": link_of(plan.link, options),
    }
    asked = {name: value for name, value in asked.items() if value is not None and value != getattr(plan, name)}
    if not asked and options.cluster is None:
        return plan
    if "link" in asked:
        asked["transfers"] = tuple(dataclasses.replace(t, link=None) for t in plan.transfers)
    if "data_parallel" in asked and any(s.reduce_us for s in plan.stages):
        raise ConfigError(
            "--data-parallel with --plan",
            expected="the replicas that its sums of gradients were counted for",
            where="the command line",
            remedy="plan again with --num-devices or --cluster",
        )
    new = dataclasses.replace(plan, **asked)
    if options.cluster is None and asked.keys() <= {"memory_limit_bytes", "data_parallel"}:
        return new
    link = new.link if "link" in asked else None
    timeline = simulate(plan, num_microbatches=new.num_microbatches, schedule=new.schedule, link=link)
    one_each = len(timeline.peak_bytes) == len(plan.stages)  # the peak of a rank is that of its stage
    stages = (
        plan.stages
        if not one_each
        else tuple(
            dataclasses.replace(s, peak_bytes=peak, activation_bytes=max(s.activation_bytes + peak - s.peak_bytes, 0))
            for s, peak in zip(plan.stages, timeline.peak_bytes, strict=True)
        )
    )
    unknown: dict[str, Any] = {"lower_bound_us": 0.0, "bottleneck_bound_us": 0.0, "proved": False, "baselines": ()}
    bubble = bubble_of(new, new.num_ranks or new.num_stages, timeline.makespan_us)
    return dataclasses.replace(new, stages=stages, step_us=timeline.makespan_us, bubble=bubble, **unknown)


def _on_cluster(plan: Plan, options: argparse.Namespace) -> Plan:
    for name in ("link_latency_us", "link_gbps", "overlap", "memory_limit", "data_parallel"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} with --plan and --cluster",
                expected="the cluster alone",
                where="the command line",
                remedy="leave it out, or write it into the cluster file",
            )
    return on_cluster(plan, Cluster.load(options.cluster))


def link_of(base: LinkProfile, options: argparse.Namespace) -> LinkProfile:
    """A link with the call's latency, bandwidth and overlap instead of its own."""
    asked: dict[str, Any] = {}
    if options.link_latency_us is not None:
        asked["latency_us"] = options.link_latency_us
    if options.link_gbps is not None:
        asked["bytes_per_us"] = options.link_gbps * BYTES_PER_US_OF_A_GBPS
    if asked:
        asked["measured"] = False
    if options.overlap is not None:
        asked["overlap"] = options.overlap
    return dataclasses.replace(base, **asked)
