"""How long a save holds up training: an asynchronous one, beside copying the state and beside a synchronous one."""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import autopipe
from benchmarks.durability.memory import loss_fn
from scenarios.launch import run_ranks
from scenarios.pipelines import TiedGPT


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def copied_anew(state: list[torch.Tensor]) -> torch.Tensor:
    """A copy in memory that the system has not given to this process before, as that of a save mostly is."""
    new = torch.frombuffer(mmap.mmap(-1, sum(t.nbytes for t in state)), dtype=torch.uint8)
    offset = 0
    for tensor in state:
        new[offset : offset + tensor.nbytes].copy_(tensor.detach().reshape(-1).view(torch.uint8))
        offset += tensor.nbytes
    return new


def one_rank(width: int, layers: int, repeats: int, folder: str) -> dict[str, Any]:
    ids = torch.randint(0, 50, (8, 12))
    engine = autopipe.pipeline(
        TiedGPT(width=width, layers=layers),
        (ids,),
        example_target=ids,
        loss_fn=loss_fn,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        data_parallel=1,
        num_microbatches=4,
    )
    step = partial(engine.train_batch, ids, target=ids)
    step()
    state = [*engine.parameters()]
    state += [v for s in engine.optimizer.state.values() for v in s.values()] if engine.optimizer else []
    save = partial(engine.save_checkpoint, folder, keep=1)
    times: dict[str, list[float]] = {"copy": [], "asynchronous": [], "step beside": [], "synchronous": [], "step": []}
    for _ in range(repeats):
        times["copy"].append(seconds(lambda: copied_anew(state)))
        times["synchronous"].append(seconds(save))
        times["step"].append(seconds(step))
        times["asynchronous"].append(seconds(partial(save, asynchronous=True)))
        times["step beside"].append(seconds(step))
        save()  # waits
    engine.close()
    return {"state_mib": sum(t.nbytes for t in state) / 2**20, **{k: statistics.median(v) for k, v in times.items()}}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = run_ranks(
            one_rank, options.ranks, options.width, options.layers, options.repeats, folder, timeout_s=280.0
        )
    print("rank  state MiB  copy ms  asynchronous save ms  synchronous save ms  step ms  step beside a save ms")
    for rank, r in enumerate(rows):
        ms = {k: 1e3 * v for k, v in r.items()}
        print(
            f"{rank:4d}  {r['state_mib']:9.0f}  {ms['copy']:7.0f}  {ms['asynchronous']:20.0f}  "
            f"{ms['synchronous']:19.0f}"
            f"  {ms['step']:7.0f}  {ms['step beside']:21.0f}"
        )
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))
