"""`autopipe plan` for devices: profiles at the sizes that are needed, the cluster of the call, and the search."""

from __future__ import annotations

import argparse
from typing import Any

from autopipe.cli.options import CONSTRAINTS
from autopipe.cli.whatif import link_of
from autopipe.cluster import Cluster
from autopipe.cost import DEFAULT_LINK
from autopipe.errors import ConfigError
from autopipe.partition import Constraints, partition
from autopipe.plan import Plan
from profiler.records import Profile

DESCRIBED_BY_CLUSTER = ("memory_limit", "link_latency_us", "link_gbps", "overlap")


def wants_search(options: argparse.Namespace) -> bool:
    """Whether the call gives devices in the place of a number of stages."""
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
