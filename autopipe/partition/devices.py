"""`partition` with devices in the place of a number of stages: the search over layouts, with its arguments checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autopipe.cluster import Cluster, Device
from autopipe.errors import PartitionError
from autopipe.partition import planning, request
from autopipe.partition.layouts import check_kinds
from autopipe.partition.search import Wanted, search
from autopipe.plan import RECOMPUTE, RUNNABLE, Plan
from autopipe.simulate.reschedule import WORTH_TRYING
from profiler.records import Profile
from profiler.sizes import check_sizes

MICROBATCHES_PER_DEVICE = 4
"""The batch, where none is named, is so many micro-batches of the profile for each device."""
NOT_SEARCHED = ("link", "overlap", "memory_limit", "objective", "split_points")


def partition(
    profile: Profile | Sequence[Profile],
    *,
    num_devices: int | None = None,
    cluster: Cluster | None = None,
    global_batch: int | None = None,
    **arguments: Any,
) -> Plan:
    """Cuts a profiled graph into stages; with `num_devices` or `cluster`, it also chooses how many, and how they are run.

    Without them it is `autopipe.partition.planning.partition`, whose arguments these are: `num_stages`, `num_microbatches`, `link`, `overlap`,
    `memory_limit`, `optimizer`, `zero_stage`, `data_parallel`, `schedule`, `objective`, `recompute`, `split_points`,
    `constraints`, `time_budget_s`, `seed`. With them, stages x replicas x micro-batches x schedule x recompute x ZeRO are searched;
    what is given among `num_stages`, `num_microbatches`, `data_parallel`, `schedule` and `zero_stage` stays as it is.

    Args:
        profile: the costs for one micro-batch; several, of other micro-batch sizes, put the times of other sizes on a line.
            With one, a size that was not measured is in proportion to it: the plan's `scaling` says so.
        num_devices: of the cluster the first so many; without a cluster they are equal, with `link`, `overlap` and `memory_limit`.
        cluster: devices and links.
        global_batch: samples of a step over all replicas; four micro-batches of the profile for each device where it is left out.

    Raises:
        PartitionError, ClusterError, ProfileError: an argument is wrong, or nothing satisfies what was asked for.
    """
    if num_devices is None and cluster is None:
        if not isinstance(profile, Profile) or global_batch is not None:
            raise PartitionError(
                "global_batch, or several profiles, without devices",
                expected="num_devices or cluster beside them",
                where="partition",
                remedy="give num_devices, or plan one profile with num_stages and num_microbatches",
            )
        return planning.partition(profile, **arguments)
    profiles = check_sizes([profile] if isinstance(profile, Profile) else profile)
    devices = _devices(profiles[0], num_devices, cluster, arguments)
    check_kinds(devices, profiles[0].device)
    batch = global_batch
    if batch is None:
        batch = profiles[0].microbatch_size * MICROBATCHES_PER_DEVICE * len(devices.devices)
    schedule = arguments.pop("schedule", None)
    if schedule is not None:
        request.checked_choice(schedule, RUNNABLE, "schedule")
    recompute = arguments.pop("recompute", "auto")
    counts = {name: arguments.pop(name, None) for name in ("num_stages", "num_microbatches", "data_parallel")}
    rest: dict[str, Any] = {
        name: arguments.pop(name)
        for name in ("zero_stage", "optimizer", "constraints")
        if arguments.get(name) is not None
    }
    rest |= {name: request.checked_count(count, name) for name, count in counts.items() if count is not None}
    wanted = Wanted(
        global_batch=request.checked_count(batch, "global_batch"),
        schedules=WORTH_TRYING if schedule is None else (schedule,),
        recompute=request.checked_choice(recompute, RECOMPUTE, "recompute"),
        **rest,
    )
    return search(profiles, devices, wanted, **arguments)


def _devices(profile: Profile, num_devices: int | None, cluster: Cluster | None, arguments: dict[str, Any]) -> Cluster:
    """The devices of a call; what describes them is taken out of the arguments."""
    given = {name: value for name in NOT_SEARCHED if (value := arguments.pop(name, None)) is not None}
    if given.pop("objective", "step") != "step" or "split_points" in given:
        raise PartitionError(
            "objective='bottleneck' or split_points with a number of devices",
            expected="the objective 'step', without split points",
            where="partition",
            remedy="give num_stages in the place of num_devices",
        )
    if cluster is not None:
        if given:
            raise PartitionError(
                f"{min(given)} beside a cluster",
                expected="links and memory in the cluster",
                where=min(given),
                remedy="leave it out, or write it into the cluster file",
            )
        return cluster if num_devices is None else cluster.first(request.checked_count(num_devices, "num_devices"))
    limit = request.checked_limit(given.get("memory_limit"))
    link = request.checked_link(profile, given.get("link"), given.get("overlap"))
    device = Device(memory_bytes=0 if limit is None else int(limit))
    return Cluster.even(request.checked_count(num_devices, "num_devices"), link, device=device)
