"""The training run that the faults are tried on: one rank fails in one phase of one step, in one way."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import time
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopipe

PHASES = ("forward", "backward", "loss", "optimizer", "data", "between steps")
WAYS = ("raise", "kill", "stop", "slow", "hold the lock")
STEP, MICROBATCH, MICROBATCHES, SLOW_S = 8, 2, 4, 3.0
ARMED: dict[str, Any] = {"now": False, "calls": 0}


def say(**what: float | str) -> None:
    """Leaves word of this rank in its file."""
    with open(ARMED["file"], "a") as file:
        file.write(json.dumps(what) + "\n")


def strike(how: str) -> None:
    """The fault itself; its time is left in the rank's file."""
    say(struck=time.monotonic())
    ARMED["now"] = False
    match how:
        case "raise":
            raise ValueError("a fault that was asked for")
        case "kill" | "stop":
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        case "slow":
            time.sleep(SLOW_S)
        case "hold the lock":
            ctypes.PyDLL(None).usleep(int(1e6 * SLOW_S))  # PyDLL keeps Python's lock


class Part(nn.Module):
    """A layer that reads a value, so that it is kept whole and run as it is; it fails in its micro-batch when its stage
    is to."""

    def __init__(self, index: int, fault: dict[str, Any]) -> None:
        super().__init__()
        self.index, self.fault, self.inner = index, fault, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if float(x.detach().sum()) == float("inf"):
            raise AssertionError("unreachable: it is here for the value that it reads")
        if ARMED["now"] and self.index == self.fault["rank"] and self.fault["phase"] in ("forward", "backward"):
            ARMED["calls"] += 1
            if ARMED["calls"] == MICROBATCH + 1:
                if self.fault["phase"] == "forward":
                    strike(self.fault["how"])
                elif self.fault["phase"] == "backward" and y.requires_grad:
                    y.register_hook(lambda g: strike(self.fault["how"]) or g)
        return y


class Loss(nn.Module):
    """The loss, which fails on the last stage."""

    def __init__(self, fault: dict[str, Any]) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if float(target.sum()) == float("inf"):
            raise AssertionError("unreachable: it is here for the value that it reads")
        if ARMED["now"] and self.fault["phase"] == "loss":
            ARMED["calls"] += 1
            if ARMED["calls"] == MICROBATCH + 1:
                strike(self.fault["how"])
        return F.mse_loss(output, target)


class Optimizer(torch.optim.SGD):
    """SGD that fails."""

    fault: ClassVar[dict[str, Any]] = {}

    def step(self, closure: Any = None) -> Any:
        if ARMED["now"] and self.fault["phase"] == "optimizer":
            strike(self.fault["how"])
        return super().step(closure)


class Whole(nn.Module):
    """The layers and the loss."""

    def __init__(self, num_stages: int, fault: dict[str, Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part(i, fault) for i in range(num_stages))
        self.loss = Loss(fault)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for part in self.parts:
            x = torch.tanh(part(x))
        return self.loss(x, target)


def main(fault: dict[str, Any], rank: int, port: int, folder: str, heartbeat_s: float) -> None:
    """One rank of the run; leaves in `folder` one file of what happened on it, and one of what it logged."""
    world = fault["world"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), AUTOPIPE_HEARTBEAT_S=str(heartbeat_s))
    if "shared_memory" in fault:
        os.environ["AUTOPIPE_SHARED_MEMORY"] = str(int(fault["shared_memory"]))
    logging.basicConfig(format="%(message)s", level=logging.WARNING, filename=f"{folder}/{rank}.log")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ARMED["file"] = f"{folder}/{rank}.json"
    Optimizer.fault = fault
    try:
        train(fault, rank)
    except autopipe.EngineError as error:
        say(raised=time.monotonic(), message=str(error))
        raise SystemExit(3) from error
    say(finished=time.monotonic())


def train(fault: dict[str, Any], rank: int) -> None:
    """The training loop, with the fault in it."""

    def batches() -> Any:
        for step in range(2 * STEP):
            ARMED.update(now=step == STEP and rank == fault["rank"], calls=0)
            if ARMED["now"] and fault["phase"] == "data":
                strike(fault["how"])
            yield torch.randn(8, 8), torch.randn(8, 8)

    with autopipe.pipeline(
        Whole(fault["world"], fault),
        (torch.randn(8, 8), torch.randn(8, 8)),
        optimizer=lambda parameters: Optimizer(parameters, lr=0.01),
        num_microbatches=MICROBATCHES,
        split_points=[f"parts.{i}" for i in range(1, fault["world"])],
    ) as engine:
        if fault["phase"] == "data":
            engine.train(batches(), log_every=0, progress=False)
            return
        for x, target in batches():
            if ARMED["now"] and fault["phase"] == "between steps":
                strike(fault["how"])
            engine.train_batch(x, target)
