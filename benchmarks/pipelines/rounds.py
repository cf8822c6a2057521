"""What a rank measures: step times of several peers in turn, and the extra memory of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopipe.engine.step.clock import Span
from benchmarks.pipelines.peers import PEERS, Sgd, Step, autopipe_step


def timed_rounds(
    steps: dict[str, Callable[[], Any]], num_rounds: int, warm_up: int = 3, after: Callable[[str], None] | None = None
) -> dict[str, list[float]]:
    """Seconds of each step, peers in turn, the first of each round another one; a barrier stands before each.

    Args:
        after: called with the name of each step of an engine of autopipe that was timed.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warm_up + num_rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            dist.barrier()
            start = time.perf_counter()
            steps[name]()
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
                if after is not None and hasattr(steps[name], "engine"):
                    after(name)
    return times


def schedule_of(step: Any) -> str:
    """The schedule of an engine."""
    schedule: str = step.engine.plan.schedule
    return schedule


def spans_of(step: Any) -> list[Span]:
    """What this rank computed in the last step of an engine."""
    _, spans = step.engine._measured.last_step()
    return [s for s in spans if not s.waiting]


def computes_s(step: Any) -> float:
    """What the forwards and backwards of this rank took in the last step of an engine."""
    return sum(s.end_us - s.start_us for s in spans_of(step)) / 1e6


def plain_stage(
    layers: list[nn.Module], rows: Tensor, num_microbatches: int, loss: tuple[Any, Tensor] | None = None
) -> Callable[[], Any]:
    """What a stage computes in a step, without any pipeline: forward and backward of each micro-batch, and the
    optimizer.

    Args:
        loss: of the last stage, the loss function and its target.
    """
    module = nn.Sequential(*layers)
    optimizer = Sgd(module.parameters())
    inputs = [piece.clone().requires_grad_() for piece in rows.chunk(num_microbatches)]
    loss_fn, targets = (None, inputs) if loss is None else (loss[0], loss[1].chunk(num_microbatches))
    gradient = torch.ones_like(inputs[0]) if loss_fn is None else torch.tensor(1 / num_microbatches)

    def step() -> None:
        optimizer.zero_grad()
        for piece, target in zip(inputs, targets, strict=True):
            output = module(piece)
            (output if loss_fn is None else loss_fn(output, target)).backward(gradient)
            piece.grad = None
        optimizer.step()

    return step


def compare(
    make: Callable[[], tuple[list[nn.Module], Tensor, Tensor, Any]],
    num_microbatches: int,
    peers: tuple[str, ...],
    num_rounds: int,
) -> dict[str, Any]:
    """Step times of the peers, of this rank's plain compute, and the losses of the first steps (equal where all do the
    same)."""
    layers, batch, target, loss_fn = make()
    steps: dict[str, Step] = {n: PEERS[n](layers, batch, target, loss_fn, num_microbatches) for n in peers}
    losses = {n: [step() for _ in range(2)] for n, step in steps.items()}
    rank, each = dist.get_rank(), len(layers) // dist.get_world_size()
    loss = (loss_fn, target) if rank == dist.get_world_size() - 1 else None
    alone = plain_stage(layers[each * rank : each * (rank + 1)], batch, num_microbatches, loss)
    computes: dict[str, list[float]] = {n: [] for n, step in steps.items() if hasattr(step, "engine")}
    times = timed_rounds(
        {**steps, "alone": alone}, num_rounds, after=lambda n: computes[n].append(computes_s(steps[n]))
    )
    schedules = {n: schedule_of(steps[n]) for n in computes}
    alone_s = times.pop("alone")
    return {"times": times, "alone": alone_s, "losses": losses, "computes": computes, "schedules": schedules}


def peak_memory(
    make: Callable[[], tuple[list[nn.Module], Tensor, Tensor, Any]], num_microbatches: int, peer: str
) -> float:
    """MB that this process holds at the peak of its second step beyond model and data, code included."""
    layers, batch, target, loss_fn = make()
    before = _status("VmRSS")
    step = PEERS[peer](layers, batch, target, loss_fn, num_microbatches)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    dist.barrier()
    step()
    return (_status("VmHWM") - before) / 1e3


def divided(
    make: Callable[[], tuple[list[nn.Module], Tensor, Tensor, Any]], num_microbatches: int, num_rounds: int
) -> tuple[int, dict[str, list[float]]]:
    """The nodes of this rank's stage, and the seconds of a micro-batch's backward in each step: whole under 1F1B (B),
    and in its two parts under ZB-H1 (I, W), in turn."""
    built = make()
    steps = {n: autopipe_step(*built, num_microbatches, schedule=n) for n in ("1f1b", "zb-h1")}
    times: dict[str, list[float]] = {kind: [] for kind in "BIW"}

    def note(name: str) -> None:
        spans = [s for s in spans_of(steps[name]) if s.action.kind in times]
        for kind in {s.action.kind for s in spans}:
            took_us = sum(s.end_us - s.start_us for s in spans if s.action.kind == kind)
            times[kind].append(took_us / num_microbatches / 1e6)

    timed_rounds(steps, num_rounds, after=note)
    return len(steps["1f1b"].engine.plan.stages[dist.get_rank()].nodes), times


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1])


def median_ms(times: list[float]) -> float:
    return statistics.median(times) * 1e3
