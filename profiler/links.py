"""The link between two ranks of a process group: latency, bandwidth, and how much of a transfer compute hides."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from profiler import accelerator
from profiler.cache import cache_dir, digest, write_whole
from profiler.errors import ProfileError
from profiler.inputs import device_name
from profiler.records import LinkProfile

SIZES = (1, 2**12, 2**16, 2**18, 2**20, 2**22, 2**24)
"""Message sizes, in bytes: from the latency alone to where bandwidth is all that counts."""
NUM_REPEATS, NUM_WARMUP = 11, 2
_LOG = logging.getLogger("autopipe.profiler")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTransport:
    """Transport of messages between two ranks other than the process group.

    Attributes:
        name: what it is called; measurements over different ways are kept apart.
        start: starts sending (true) or receiving a tensor, and gives what waits for it.
        buffered: as in `LinkProfile`.
    """

    name: str
    start: Callable[[torch.Tensor, bool], Callable[[], object]]
    buffered: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkMeasurement:
    """Measurement between two ranks.

    Attributes:
        sizes: message sizes, in bytes.
        idle_us: one-way time of each, nothing else running (half of a round trip).
        busy_us: the same while both ranks compute: what is left of the transfer after the compute, not hidden.
        overlap: the share of a large transfer that compute hides.
    """

    sizes: tuple[int, ...]
    idle_us: tuple[float, ...]
    busy_us: tuple[float, ...]
    overlap: float

    def profile(self) -> LinkProfile:
        """Latency and bandwidth that fit the idle times best, in relative error."""
        latency_us, bytes_per_us = fit_line(self.sizes, self.idle_us)
        return LinkProfile(latency_us=latency_us, bytes_per_us=bytes_per_us, overlap=self.overlap)


def fit_line(sizes: Sequence[int], times_us: Sequence[float]) -> tuple[float, float]:
    """Latency (µs) and bandwidth (bytes/µs) of `t = latency + size / bandwidth`, by least squares of the relative
    error."""
    w = [1 / (t * t) for t in times_us]
    s, sx = sum(w), sum(a * x for a, x in zip(w, sizes, strict=True))
    st = sum(a * t for a, t in zip(w, times_us, strict=True))
    sxx = sum(a * x * x for a, x in zip(w, sizes, strict=True))
    sxt = sum(a * x * t for a, x, t in zip(w, sizes, times_us, strict=True))
    slope = (s * sxt - sx * st) / (s * sxx - sx * sx)
    if slope <= 0:  # the largest message is the best witness where noise hides the slope
        slope = times_us[-1] / sizes[-1]
    latency_us = max(0.0, (st - slope * sx) / s)
    return latency_us, 1 / slope


def measure_link(
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str | None = None,
    cache: bool = True,
    way: LinkTransport | None = None,
) -> LinkProfile:
    """Measures the link between the first two ranks of a group. Collective: every rank of the group calls it.

    Args:
        group: the process group; the default one where it is None. It must be used by nothing else meanwhile.
        device: where messages are; the current CUDA device under NCCL, else the CPU.
        cache: use what was measured before between these hosts and devices, and keep what is measured now.
        way: how messages go, on the first two ranks; over the group where it is None. On other ranks its name counts
            alone.

    Returns:
        The link, the same on every rank.

    Raises:
        ProfileError: there is no process group, it has one rank only, or a transfer fails.
    """
    members = _members(group)
    where = _device(group, device)
    identity = _identity(group, where, members, "process group" if way is None else way.name)
    found = [_read(identity) if cache and dist.get_rank() == members[0] else None]
    dist.broadcast_object_list(found, members[0], group=group, device=where)
    if found[0] is None:
        measured = measure_sizes(group, device=where, way=way)
        found = [measured.profile() if measured is not None else None]
        dist.broadcast_object_list(found, members[0], group=group, device=where)
        if cache and dist.get_rank() == members[0]:
            _keep(identity, found[0])
    assert isinstance(found[0], LinkProfile)
    return dataclasses.replace(found[0], buffered=way is not None and way.buffered)


def measure_sizes(
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str | None = None,
    way: LinkTransport | None = None,
) -> LinkMeasurement | None:
    """As `measure_link`, size by size and never from the cache; None on ranks beyond the first two.

    Raises:
        ProfileError: as for `measure_link`.
    """
    members, where = _members(group), _device(group, device)
    if dist.get_rank() not in members[:2]:
        return None
    try:
        pair = _Pair(group, members, where, way)
        idle = tuple(pair.idle_us(size) for size in SIZES)
        busy = [pair.busy_us(size, time_us) for size, time_us in zip(SIZES, idle, strict=True)]
    except RuntimeError as cause:
        raise ProfileError(
            f"a transfer between ranks {members[0]} and {members[1]} failed: {cause}",
            where="profiler.measure_link",
            remedy="check that both ranks are alive and that every rank of the group called it",
        ) from cause
    hidden = statistics.median(share for _, share in busy[-3:])
    return LinkMeasurement(sizes=SIZES, idle_us=idle, busy_us=tuple(b for b, _ in busy), overlap=hidden)


class _Pair:
    """The two ends of a link; both run the same calls."""

    def __init__(
        self, group: dist.ProcessGroup | None, members: Sequence[int], device: torch.device, way: LinkTransport | None
    ) -> None:
        self._group, self._device = group, device
        self._start = self._over_group if way is None else way.start
        self._first = dist.get_rank() == members[0]
        self._peer = members[1] if self._first else members[0]
        self._square = torch.full((192, 192), 1e-3, device=device)
        self._buffer = torch.zeros(max(SIZES), dtype=torch.uint8, device=device)
        self._compute_us = self._usual(lambda: self._compute(16)) / 16

    def idle_us(self, size: int) -> float:
        """Half of a round trip."""
        message = self._buffer[:size]

        def round_trip() -> None:
            for is_sender in (self._first, not self._first):
                self._start(message, is_sender)()

        return self._usual(round_trip) / 2

    def busy_us(self, size: int, idle_us: float) -> tuple[float, float]:
        """Time that a transfer adds to about as much compute, and the share of it that was hidden (0 to 1)."""
        message = self._buffer[:size]
        count = max(1, round(idle_us / self._compute_us))
        compute_us = self._usual(lambda: self._compute(count))

        def both() -> None:
            wait = self._start(message, self._first)
            self._compute(count)
            wait()

        added_us = max(0.0, self._usual(both) - compute_us)
        hidden = (idle_us - added_us) / min(idle_us, compute_us)
        return added_us, min(1.0, max(0.0, hidden))

    def _over_group(self, message: torch.Tensor, is_sender: bool) -> Callable[[], object]:
        operation = dist.isend if is_sender else dist.irecv
        work = operation(message, self._peer, group=self._group)
        assert work is not None
        return work.wait

    def _compute(self, count: int) -> None:
        square = self._square
        for _ in range(count):
            square = square @ self._square

    def _usual(self, run: Callable[[], None]) -> float:
        """The lower quartile of the time, in microseconds, of the slower of the two ends: what else runs on a machine
        only adds."""
        times = []
        for _ in range(NUM_WARMUP + NUM_REPEATS):
            self._meet()
            start = time.perf_counter_ns()
            run()
            self._finish()
            times.append((time.perf_counter_ns() - start) / 1e3)
        return self._larger(statistics.quantiles(times[NUM_WARMUP:], n=4)[0])

    def _meet(self) -> None:
        """Both ends begin together: the first waits for an answer to a message of one byte."""
        for is_sender in (self._first, not self._first):
            self._start(self._buffer[:1], is_sender)()
        self._finish()

    def _larger(self, mine: float) -> float:
        here = torch.tensor([mine], dtype=torch.float64, device=self._device)
        there = torch.zeros_like(here)
        for is_sender in (self._first, not self._first):
            self._start(here if is_sender else there, is_sender)()
        return max(mine, float(there.item()))

    def _finish(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def _members(group: dist.ProcessGroup | None) -> list[int]:
    """Global ranks of the group."""
    if not dist.is_available() or not dist.is_initialized():
        raise ProfileError(
            "no process group",
            where="profiler.measure_link",
            remedy="call torch.distributed.init_process_group() first",
        )
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    if len(members) < 2:
        raise ProfileError(
            "a group of one rank",
            expected="at least two",
            where="profiler.measure_link",
            remedy="start two processes: torchrun --nproc-per-node 2 ...",
        )
    return members


def _device(group: dist.ProcessGroup | None, device: torch.device | str | None) -> torch.device:
    return accelerator.device_of_group(group) if device is None else torch.device(device)


def _identity(
    group: dist.ProcessGroup | None, device: torch.device, members: Sequence[int], way: str
) -> dict[str, Any]:
    """Conditions of a measurement: backend, torch, and host and device of the two ends."""
    ends: list[Any] = [None] * len(members)
    name = device_name(device)
    dist.all_gather_object(ends, (platform.node(), name, torch.get_num_threads()), group=group)
    return {
        "schema": "autopipe.link/1",
        "backend": dist.get_backend(group),
        "way": way,
        "torch": torch.__version__,
        "ends": [list(end) for end in ends[:2]],
    }


def _path(identity: dict[str, Any]) -> Path:
    return cache_dir() / "links" / f"{digest(identity)[:40]}.json"


def _read(identity: dict[str, Any]) -> LinkProfile | None:
    """The cached link, where it is whole and sensible."""
    path = _path(identity)
    try:
        entry = json.loads(path.read_text())
        body = entry["body"]
        if entry["digest"] != digest(body) or body["identity"] != identity:
            raise ValueError("another entry's content")
        latency_us, bytes_per_us, overlap = (float(body["link"][k]) for k in ("latency_us", "bytes_per_us", "overlap"))
        link = LinkProfile(latency_us=latency_us, bytes_per_us=bytes_per_us, overlap=overlap)
        if not (link.latency_us >= 0 and link.bytes_per_us > 0 and 0 <= link.overlap <= 1):
            raise ValueError("values that no link has")
        return link
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        _LOG.info("measuring again: the cached entry %s is not valid (%s)", path, cause)
        return None


def _keep(identity: dict[str, Any], link: Any) -> None:
    body = {"identity": identity, "link": dataclasses.asdict(link)}
    try:
        write_whole(_path(identity), json.dumps({"digest": digest(body), "body": body}))
    except OSError as cause:
        _LOG.warning("the link is not cached: %s cannot be written (%s)", cache_dir(), cause.strerror)
