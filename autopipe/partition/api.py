"""`partition` with devices in the place of a number of stages: the search over layouts, with its arguments checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autopipe.cluster import Cluster, Device
from autopipe.errors import PartitionError
from autopipe.partition import arguments, planner
from autopipe.partition.cluster.device_layouts import check_kinds
from autopipe.partition.cluster.strategy_search import SearchSpace, search
from autopipe.partition.constraints import Constraints
from autopipe.plan import RECOMPUTE, Plan
from autopipe.schedule.kinds import DEFAULT, TRAINING, TRIED
from profiler.records import LinkProfile, Profile
from profiler.sizes import check_sizes

MICROBATCHES_PER_DEVICE = 4
"""The batch, where none is named, is so many micro-batches of the profile for each device."""


def partition(
    profile: Profile | Sequence[Profile],
    *,
    num_stages: int | None = None,
    num_microbatches: int | None = None,
    num_devices: int | None = None,
    cluster: Cluster | None = None,
    global_batch: int | None = None,
    link: LinkProfile | None = None,
    overlap: float | None = None,
    memory_limit: float | None = None,
    optimizer: str | float = "adam",
    zero_stage: int | None = None,
    data_parallel: int | None = None,
    schedule: str | None = None,
    objective: str = "step",
    recompute: str = "auto",
    split_points: Sequence[str] | None = None,
    constraints: Constraints | None = None,
    time_budget_s: float | None = None,
    seed: int = 0,
) -> Plan:
    """Cuts a profiled graph into stages; with `num_devices` or `cluster` it also constrains how many, and how they are
    run.

    Without devices, `num_stages` or `split_points` is needed. With them, stages x replicas x micro-batches x schedule x
    recompute x ZeRO are searched, and what is given of these stays as it is.

    Args:
        profile: the costs of the graph's nodes for one micro-batch; with devices also several, of other micro-batch
            sizes: the times of other sizes are then on a line. With one they are in proportion; the plan's `scaling`
            says which.
        num_stages: K, the number of stages, each of at least one node.
        num_microbatches: M, micro-batches of a step of one replica; 4 K where neither it nor devices are given.
        num_devices: of the cluster the first so many; without a cluster equal ones, with `link`, `overlap` and
            `memory_limit`.
        cluster: devices and links.
        global_batch: samples of a step over all replicas, with devices; four micro-batches of the profile for each
            device where it is left out.
        link: between two stages; the profile's where it is left out, else a default that is labelled as not measured.
        overlap: the share of a transfer that compute hides, from 0 to 1; the link's where it is left out.
        memory_limit: bytes of each device; None plans without a limit.
        optimizer: `adam`, `adamw`, `momentum`, `sgd`, `none`, or bytes of state for each byte of trained parameter.
        zero_stage: 1 divides the optimizer state by the replicas; left out: 0, or with devices what memory demands.
        data_parallel: replicas of the pipeline; 1 where neither it nor devices are given.
        schedule: `1f1b` or `gpipe`; with devices any that the engine runs, the fastest where it is left out.
        objective: `step` makes the simulated step short, `bottleneck` the largest load of a stage (not with devices).
        recompute: `auto` computes activations again as far as memory demands, the cheapest first; `none` never does,
            `full` does for every stage as a whole.
        split_points: FQNs of submodules at which a new stage begins; nothing is searched then (not with devices).
        constraints: modules that stay together, or stand alone, first or last; what each costs is in the plan's
            baselines.
        time_budget_s: seconds of search, counted in work done, so that a plan does not depend on how busy the machine
            is; 2, or 8 with devices.
        seed: of the random orders; the same seed gives the same plan.

    Returns:
        The plan, with simulated step, bounds, the splits that a user would otherwise make, and the other ways that were
        searched.

    Raises:
        PartitionError, ClusterError, ProfileError: an argument is wrong, or nothing satisfies what was asked for.
    """
    described = {"link": link, "overlap": overlap, "memory_limit": memory_limit}
    if num_devices is None and cluster is None:
        if not isinstance(profile, Profile) or global_batch is not None:
            raise PartitionError(
                "global_batch, or several profiles, without devices",
                expected="num_devices or cluster beside them",
                where="partition",
                remedy="give num_devices, or plan one profile with num_stages and num_microbatches",
            )
        return planner.partition(
            profile,
            num_stages=num_stages,
            num_microbatches=num_microbatches,
            link=link,
            overlap=overlap,
            memory_limit=memory_limit,
            optimizer=optimizer,
            zero_stage=0 if zero_stage is None else zero_stage,
            data_parallel=1 if data_parallel is None else data_parallel,
            schedule=DEFAULT if schedule is None else schedule,
            objective=objective,
            recompute=recompute,
            split_points=split_points,
            constraints=constraints,
            time_budget_s=2.0 if time_budget_s is None else time_budget_s,
            seed=seed,
        )
    if objective != "step" or split_points is not None:
        raise PartitionError(
            "objective='bottleneck' or split_points with a number of devices",
            expected="the objective 'step', without split points",
            where="partition",
            remedy="give num_stages in the place of num_devices",
        )
    profiles = check_sizes([profile] if isinstance(profile, Profile) else profile)
    devices = _devices(profiles[0], num_devices, cluster, described)
    check_kinds(devices, profiles[0].device)
    batch = global_batch
    if batch is None:
        batch = profiles[0].microbatch_size * MICROBATCHES_PER_DEVICE * len(devices.devices)
    if schedule is not None:
        arguments.checked_choice(schedule, TRAINING, "schedule")
    counts = {"num_stages": num_stages, "num_microbatches": num_microbatches, "data_parallel": data_parallel}
    wanted = SearchSpace(
        global_batch=arguments.checked_count(batch, "global_batch"),
        zero_stage=zero_stage,
        schedules=TRIED if schedule is None else (schedule,),
        optimizer=optimizer,
        recompute=arguments.checked_choice(recompute, RECOMPUTE, "recompute"),
        constraints=constraints or Constraints(),
        **{name: arguments.checked_count(count, name) for name, count in counts.items() if count is not None},
    )
    return search(profiles, devices, wanted, time_budget_s=8.0 if time_budget_s is None else time_budget_s, seed=seed)


def _devices(profile: Profile, num_devices: int | None, cluster: Cluster | None, described: dict[str, Any]) -> Cluster:
    """The devices of a call."""
    given = {name: value for name, value in described.items() if value is not None}
    if cluster is not None:
        if given:
            raise PartitionError(
                f"{min(given)} beside a cluster",
                expected="links and memory in the cluster",
                where=min(given),
                remedy="leave it out, or write it into the cluster file",
            )
        return cluster if num_devices is None else cluster.first(arguments.checked_count(num_devices, "num_devices"))
    limit = arguments.checked_limit(given.get("memory_limit"))
    link = arguments.checked_link(profile, given.get("link"), given.get("overlap"))
    device = Device(memory_bytes=0 if limit is None else int(limit))
    return Cluster.even(arguments.checked_count(num_devices, "num_devices"), link, device=device)
