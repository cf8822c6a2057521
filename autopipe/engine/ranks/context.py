"""The processes of a run: who this one is, its device, and the few collective questions that are asked outside of a
step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from autopipe.engine.failures.bootstrap import start_monitor, wake
from autopipe.engine.failures.interrupt import Alarm
from autopipe.engine.failures.monitor import RankMonitor
from autopipe.engine.failures.preemption import Preemption
from autopipe.errors import AutopipeError, ConfigError, EngineError
from profiler import accelerator

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Context:
    """This process among the others.

    Attributes:
        rank, world_size: as `torch.distributed` counts; 0 and 1 outside of a launch.
        device: where this rank's stage runs.
        control: a gloo group over all ranks for small messages on the CPU; None with one process.
        owns_world: the default process group was made here, and is destroyed on closing.
        monitor: tells the other ranks of failures here, and raises theirs.
        groups: the process groups that the engine has made.
        preemption: whether this process was asked to end.
        alarm: ends what waits for messages of ranks of this host.
    """

    rank: int
    world_size: int
    device: torch.device
    control: Any = None
    owns_world: bool = False
    monitor: RankMonitor = field(default_factory=RankMonitor)
    groups: list[Any] = field(default_factory=list)
    preemption: Preemption = field(default_factory=Preemption)
    alarm: Alarm = field(default_factory=Alarm)

    def new_group(self, ranks: Sequence[int] | None = None, **options: Any) -> Any:
        """A process group, whose connections end with a failure of the run. Collective over all ranks."""
        group = dist.new_group(None if ranks is None else sorted(ranks), **options)
        self.keep(group)
        return group

    def keep(self, group: Any) -> None:
        """Takes note of a group that this rank may be in."""
        if group is not dist.GroupMember.NON_GROUP_MEMBER and group not in self.groups:
            self.groups.append(group)

    @property
    def num_local(self) -> int:
        """The processes of the launch on this host; all of them where the launcher does not say."""
        return min(int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)), self.world_size)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.monitor.waiting():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, work: Callable[[], T]) -> T:
        """Does `work` on every rank; where it fails on any, every rank raises the first rank's error."""
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:  # noqa: BLE001 (raised again on every rank, below)
            error = caught
        errors = self.gather(_portable(error, self.rank))
        first = next((e for e in errors if e is not None), None)
        if first is not None:
            if error is not None and errors[self.rank] is first:
                raise error
            raise first
        return result  # type: ignore[return-value]

    def once(self, work: Callable[[], T]) -> T:
        """Does `work` on rank 0 alone and gives its result, or raises its error, on every rank."""
        results = self.gather(self._attempt(work) if self.rank == 0 else (None, None))
        value, error = results[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def _attempt(self, work: Callable[[], T]) -> tuple[T | None, Exception | None]:
        try:
            return work(), None
        except Exception as caught:
            if self.world_size == 1:
                raise
            return None, _portable(caught, self.rank)

    def require_equal(self, value: str, what: str, remedy: str) -> None:
        """Raises on every rank where the ranks do not all pass the same text."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise EngineError(
                    f"rank 0 has {what} {values[0]}, rank {rank} has {other}",
                    expected="the same on all ranks",
                    remedy=remedy,
                )

    def close(self) -> None:
        """Says goodbye to the other ranks, then destroys the process groups that the engine has made; peers that wait
        in them get an error."""
        self.monitor.close()
        self.alarm.close()
        groups, self.groups, self.control = self.groups, [], None
        if dist.is_initialized():
            for group in groups:
                if group is not dist.GroupMember.WORLD:  # a mesh of replicas alone gives the world itself
                    dist.destroy_process_group(group)
            if self.owns_world:
                dist.destroy_process_group()

    def interrupt(self) -> None:
        """End everything that waits for other ranks with an error, from any thread."""
        self.alarm.ring()
        wake(self.groups, self.rank)


def _portable(error: Exception | None, rank: int) -> Exception | None:
    """The error in a form that any rank can unpickle."""
    if error is None or isinstance(error, AutopipeError):
        return error
    return EngineError(
        f"{type(error).__name__}: {error}", where=f"rank {rank}", remedy="see the traceback of that rank"
    )


def make_context(device: torch.device | str | None) -> Context:
    """The context of this process. Under torchrun a process group is made where the script has made none.

    Raises:
        ConfigError: the device is not there.
        EngineError: the ranks cannot reach each other.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not dist.is_initialized() and not launched:
        return Context(rank=0, world_size=1, device=_device(device))
    chosen = _device(device)
    owns = not dist.is_initialized()
    if owns:
        on_accelerator = accelerator.is_accelerator(chosen)
        if on_accelerator:
            accelerator.use(chosen)
        store, rank, world_size = _store_of_this_attempt()
        dist.init_process_group(
            accelerator.backend(chosen),
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=chosen if on_accelerator else None,
        )
    if dist.get_world_size() == 1:
        return Context(rank=0, world_size=1, device=chosen, owns_world=owns)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    context = Context(rank=rank, world_size=world_size, device=chosen, owns_world=owns, monitor=RankMonitor(rank))
    context.control = context.new_group(backend="gloo")
    start_monitor(context.monitor, world_size, context.gather, context.interrupt)
    return context


def _store_of_this_attempt() -> tuple[dist.Store, int, int]:
    """The launch's store, rank and number of ranks; after a restart by torchrun, apart from the keys of the attempt
    before.

    torchrun keeps its store over restarts, and gloo would connect to addresses that the dead ranks have left in it.
    """
    store, rank, world_size = next(dist.rendezvous("env://"))
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, world_size


def _device(device: torch.device | str | None) -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device is None:
        return accelerator.device_of_rank(local_rank)
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"device {device!r}",
            expected=f"a torch device such as cpu, {accelerator.EXAMPLES}",
            where="device",
            remedy="pass another device",
        ) from None
    if accelerator.is_accelerator(chosen):
        if not accelerator.is_there(chosen):
            raise ConfigError(
                f"device {device!r}",
                expected="a device that is there",
                where="device",
                remedy=f"pass device='cpu'; this machine shows {accelerator.kind() or 'no accelerator'}",
            )
        return torch.device(chosen.type, local_rank if chosen.index is None else chosen.index)
    return chosen
