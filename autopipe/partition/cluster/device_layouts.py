"""Ways to lay a pipeline and its replicas on the devices of a cluster, and what each stage then runs on."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopipe.cluster import Cluster
from autopipe.cost import StageDevices
from autopipe.errors import PartitionError
from autopipe.plan import Plan, StagePlan
from profiler.records import LinkProfile

FEW_ORDERS = 24
"""Orders of uneven devices over the stages that are all tried; of more, only those by speed and by memory."""
MOST_LISTED = 8
"""Stages up to which all orders are listed, to find the different ones."""
STAGES, REPLICAS = "stages", "replicas"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLayout:
    """D replicas of P ranks on D x P devices.

    Attributes:
        data_parallel, num_ranks: D and P.
        placement: how it came about: `stages` of a replica are neighbours, `replicas` of a stage are, or an order of
            devices.
        ranks: (D x P) the device that runs each pipeline rank of each replica, replica by replica.
    """

    data_parallel: int
    num_ranks: int
    placement: str
    ranks: tuple[int, ...]

    def replicas_of(self, pipeline_rank: int) -> tuple[int, ...]:
        """The devices that run one pipeline rank in all replicas."""
        return self.ranks[pipeline_rank :: self.num_ranks]


def layouts(cluster: Cluster, data_parallel: int) -> Iterator[DeviceLayout]:
    """The different layouts of so many replicas on all devices: those that cost the same appear once."""
    num_devices = len(cluster.devices)
    D, P = data_parallel, num_devices // data_parallel
    seen = set()
    for placement, ranks in _orders(cluster, D, P):
        layout = DeviceLayout(data_parallel=D, num_ranks=P, placement=placement, ranks=ranks)
        devices = stage_devices(cluster, layout, P)
        costs = tuple(getattr(devices, field.name).tobytes() for field in dataclasses.fields(devices))
        key = (costs, memory_limits(cluster, layout, P))
        if key not in seen:
            seen.add(key)
            yield layout


def _orders(cluster: Cluster, D: int, P: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    devices = cluster.devices
    yield STAGES, tuple(range(D * P))
    yield REPLICAS, _replicas_together(list(range(D * P)), D, P)
    if cluster.is_even:
        return
    # Equal devices run the same stage: the slowest replica holds the others up.
    by_speed = sorted(range(D * P), key=lambda r: (-devices[r].speed, -_memory(cluster, r), r))
    groups = [by_speed[i * D : (i + 1) * D] for i in range(P)]
    kinds = [tuple((devices[r].speed, devices[r].memory_bytes) for r in group) for group in groups]
    if P <= MOST_LISTED and _num_orders(kinds) <= FEW_ORDERS:
        distinct = {tuple(kinds[i] for i in order): order for order in itertools.permutations(range(P))}
        for order in distinct.values():
            yield f"devices in the order {order}", _replicas_together([r for i in order for r in groups[i]], D, P)
        return
    yield "fastest first", _replicas_together(by_speed, D, P)
    yield "fastest last", _replicas_together([r for group in reversed(groups) for r in group], D, P)
    by_memory = sorted(range(D * P), key=lambda r: (-_memory(cluster, r), -devices[r].speed, r))
    yield "most memory first", _replicas_together(by_memory, D, P)


def _memory(cluster: Cluster, device: int) -> float:
    return cluster.devices[device].memory_bytes or math.inf


def _num_orders(kinds: list[tuple[tuple[float, int], ...]]) -> float:
    return math.factorial(len(kinds)) / math.prod(math.factorial(kinds.count(kind)) for kind in set(kinds))


def _replicas_together(devices: list[int], D: int, P: int) -> tuple[int, ...]:
    """Neighbouring devices run the same stage in all replicas."""
    return tuple(devices[p * D + d] for d in range(D) for p in range(P))


def stage_devices(cluster: Cluster, layout: DeviceLayout, num_stages: int) -> StageDevices:
    """Devices of each of K stages, stage s on pipeline rank s modulo P: the slowest of its replicas, and of their
    links.

    Gradients are summed by a ring over the replicas (Patarasuk and Yuan, J. Parallel Distrib. Comput. 2009), at the
    pace of its slowest link: 2 (D - 1) messages of a D-th of the bytes each.
    """
    K, D, P = num_stages, layout.data_parallel, layout.num_ranks
    speed, latency, per_byte, exposed = np.ones(P), np.zeros((P, P)), np.zeros((P, P)), np.zeros((P, P))
    ring_latency, ring_per_byte = np.zeros(P), np.zeros(P)
    for p in range(P):
        replicas = layout.replicas_of(p)
        speed[p] = min(cluster.devices[r].speed for r in replicas)
        if D > 1:
            link = cluster.slowest_link(list(zip(replicas, (*replicas[1:], replicas[0]), strict=True)))
            ring_latency[p], ring_per_byte[p] = 2 * (D - 1) * link.latency_us, 2 * (D - 1) / D / link.bytes_per_us
        for q in range(P):
            if p != q:
                link = cluster.slowest_link(list(zip(replicas, layout.replicas_of(q), strict=True)))
                latency[p, q], per_byte[p, q], exposed[p, q] = link.latency_us, 1 / link.bytes_per_us, 1 - link.overlap
    rank = np.arange(K) % P
    between = np.ix_(rank, rank)
    return StageDevices(
        speed=speed[rank],
        latency_us=latency[between],
        us_per_byte=per_byte[between],
        exposed=exposed[between],
        reduce_latency_us=ring_latency[rank],
        reduce_us_per_byte=ring_per_byte[rank],
    )


def memory_limits(cluster: Cluster, layout: DeviceLayout, num_stages: int) -> tuple[float, ...]:
    """(K) memory of each stage's device, shared evenly where a device runs several stages; infinite without a limit."""
    P = layout.num_ranks
    each = [min(_memory(cluster, r) for r in layout.replicas_of(p)) for p in range(P)]
    return tuple(each[s % P] / -(-(num_stages - s % P) // P) for s in range(num_stages))


def check_kinds(cluster: Cluster, device: str) -> None:
    """Devices named by product must be what the costs are of: the ratio of two products differs from operator to
    operator.

    Raises:
        PartitionError: a device of the cluster is of another kind than the costs.
    """
    strange = sorted({d.kind for d in cluster.devices if d.kind not in ("", device)})
    if strange:
        raise PartitionError(
            f"a device {strange[0]!r} in the cluster, and costs of {device!r}",
            expected="costs of that device, or a speed in its place",
            where="cluster",
            remedy=f"profile with --device {strange[0]}, or --from FILE beside it, or give its speed against "
            f"{device!r}",
        )


def on_cluster(plan: Plan, cluster: Cluster) -> Plan:
    """The same cuts on the first devices of a cluster: their speeds, memory and links, and the sums over the replicas
    on them.

    Raises:
        ClusterError: it has fewer devices than the plan.
        PartitionError: a device of another kind than the plan's costs are of.
    """
    P, D = plan.num_ranks or plan.num_stages, plan.data_parallel
    cluster = cluster.first(P * D)
    check_kinds(cluster, plan.device)
    layout = DeviceLayout(data_parallel=D, num_ranks=P, placement=STAGES, ranks=plan.ranks or tuple(range(P * D)))
    devices = stage_devices(cluster, layout, plan.num_stages)
    limits = memory_limits(cluster, layout, P)
    stages = tuple(
        dataclasses.replace(
            s,
            forward_us=s.forward_us / float(devices.speed[s.index]),
            backward_us=s.backward_us / float(devices.speed[s.index]),
            reduce_us=_reduction_us(devices, s),
            memory_limit_bytes=0 if math.isinf(limits[s.index % P]) else int(limits[s.index % P]),
        )
        for s in plan.stages
    )
    transfers = tuple(dataclasses.replace(t, link=devices.link(t.source, t.target)) for t in plan.transfers)
    unknown: dict[str, Any] = {"lower_bound_us": 0.0, "bottleneck_bound_us": 0.0, "proved": False, "baselines": ()}
    unknown |= {"candidates": (), "search_bound_us": 0.0, "memory_limit_bytes": 0}
    return dataclasses.replace(plan, stages=stages, transfers=transfers, link=cluster.within, **unknown)


def _reduction_us(devices: StageDevices, stage: StagePlan) -> float:
    if not stage.gradient_bytes:
        return 0.0
    k = stage.index
    return float(devices.reduce_latency_us[k] + devices.reduce_us_per_byte[k] * stage.gradient_bytes)


def nominal_link(cluster: Cluster, layout: DeviceLayout) -> LinkProfile:
    """The link with which the dynamic program counts: that of the slowest border of the pipeline."""
    P = layout.num_ranks
    pairs = [
        (a, b) for p in range(P - 1) for a, b in zip(layout.replicas_of(p), layout.replicas_of(p + 1), strict=True)
    ]
    return cluster.slowest_link(pairs)
