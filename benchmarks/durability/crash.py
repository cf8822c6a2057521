"""A crash at any moment of saving loses nothing: processes are killed while they save, and what they had saved must
still be there.

Each run saves without end; the weights of save number n are all n, and every folder is saved twice, so that replacing
is met too. One of its processes, or all, get SIGKILL at a random moment. Then the newest whole checkpoint must load, be
of one save alone, and of none before the last that was reported as done. A full disk (a limit on the size of a file)
must give an error on every rank, and leave the last checkpoint as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import autopipe
from autopipe.checkpoint import MODEL, Reader, newest
from autopipe.plan import Plan
from scenarios.launch import run_ranks, start_ranks

SAVES_PER_FOLDER, KEEP = 2, 2


def make_engine(width: int, plan: Plan | None = None) -> Any:
    model, x = nn.Sequential(*(nn.Linear(width, width) for _ in range(4))), torch.randn(4, width)
    return autopipe.pipeline(model, (x,), example_target=x, loss_fn=F.mse_loss, plan=plan)


def planned(width: int) -> Plan:
    return make_engine(width).plan


def save_without_end(folder: str, asynchronous: bool, width: int, plan: Plan | None) -> None:
    """Saves for ever; appends a line to `FOLDER.done` for each save that is whole."""
    engine = make_engine(width, plan)
    for number in itertools.count(1):
        for parameter in engine.parameters():
            parameter.data.fill_(number)
        engine.save_checkpoint(folder, step=number // SAVES_PER_FOLDER, keep=KEEP, asynchronous=asynchronous)
        done = number - 1 if asynchronous else number  # the next save has waited for this one
        if engine.is_first_rank and done:
            with open(f"{folder}.done", "a") as file:
                file.write(f"{done}\n")


def last_done(folder: Path) -> int:
    file = folder.with_name(f"{folder.name}.done")
    lines = file.read_text().splitlines() if file.exists() else []
    return int(lines[-1]) if lines else 0  # the file is there a moment before its first line


def saved_number(folder: Path) -> int:
    """The number of the save that the newest whole checkpoint is of.

    Raises:
        CheckpointError: there is none, or it is damaged.
        AssertionError: it is of several saves.
    """
    reader = Reader(newest(folder))
    values = {v for key in reader.stored if key.startswith(MODEL) for v in reader.read(key).unique().tolist()}
    assert len(values) == 1, f"weights of saves {sorted(values)}"
    return int(values.pop())


def crash(
    folder: Path, *, ranks: int, asynchronous: bool, width: int, chance: random.Random, plan: Plan | None = None
) -> dict[str, Any]:
    """Lets processes save, kills them, and looks at what is left."""
    _, processes = start_ranks(save_without_end, ranks, str(folder), asynchronous, width, plan)
    try:
        deadline = time.monotonic() + 60
        while last_done(folder) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        victims = chance.choice([processes, [chance.choice(processes)]])
        for process in victims:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.1 if len(victims) < ranks else 0)  # the others notice, or go on for a moment
    finally:
        for process in processes:
            process.kill()
            process.join()
    done, unfinished = last_done(folder), [p.name for p in folder.glob(".writing-*")]
    try:
        found, why = saved_number(folder), ""
    except (autopipe.CheckpointError, AssertionError) as error:
        found, why = -1, str(error)
    return {
        "ranks": ranks,
        "asynchronous": asynchronous,
        "killed": len(victims),
        "done": done,
        "found": found,
        "unfinished": bool(unfinished),
        "lost": done < 2 or found < done,
        "why": why,
    }


def save_on_a_full_disk(folder: str, limit_bytes: int, asynchronous: bool, width: int) -> tuple[str, int]:
    """Saves once, then once with a limit on the size of files, then once without. Returns the error, and the save that
    stood after it."""
    engine = make_engine(width)
    for parameter in engine.parameters():
        parameter.data.fill_(1)
    engine.save_checkpoint(folder, step=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    told = ""
    try:
        engine.save_checkpoint(folder, step=0, asynchronous=asynchronous)
        engine.state_dict()  # any call of the engine tells, once the thread has come to its end
        engine.save_checkpoint(folder, step=1)
    except autopipe.CheckpointError as error:
        told = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    stood = saved_number(Path(folder))
    engine.save_checkpoint(folder, step=2)  # the engine goes on
    engine.close()
    return told, stood


def full_disks(width: int) -> list[dict[str, Any]]:
    """A disk that is full after a few bytes, in the middle of the tensors, and where all but the largest file fits."""
    rows = []
    for limit, asynchronous, ranks in itertools.product((0, 1000, width * width * 4), (False, True), (1, 2)):
        with tempfile.TemporaryDirectory() as folder:
            results = run_ranks(save_on_a_full_disk, ranks, f"{folder}/run", limit, asynchronous, width)
        for told, stood in results:
            rows.append({"limit": limit, "asynchronous": asynchronous, "ranks": ranks, "error": told, "stood": stood})
    return rows


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crashes", type=int, default=100)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    chance, rows = random.Random(options.seed), []
    plans = {ranks: run_ranks(planned, ranks, options.width)[0] for ranks in (1, 2)}  # so that runs begin at once
    full = full_disks(options.width)
    right = [r for r in full if r["error"] and r["stood"] == 1]
    print(f"{len(full)} ranks on full disks: {len(right)} with an error and the last checkpoint as it was", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.crashes):
            place = Path(folder) / str(number)
            row = crash(
                place,
                ranks=1 + number % 2,
                asynchronous=number % 4 >= 2,
                width=options.width,
                chance=chance,
                plan=plans[1 + number % 2],
            )
            rows.append(row)
            if row["lost"]:
                print(row, flush=True)
            elif number % 10 == 9:
                print(f"{number + 1} crashes", flush=True)
            with contextlib.suppress(OSError):
                shutil.rmtree(place)
    lost = sum(r["lost"] for r in rows)
    print(
        f"{len(rows)} crashes, {sum(r['unfinished'] for r in rows)} with a checkpoint half written, by ranks and way: "
        f"{dict(Counter((r['ranks'], 'asynchronous' if r['asynchronous'] else 'synchronous') for r in rows))}; "
        f"{lost} lost"
    )
    if options.output:
        options.output.write_text(json.dumps({"crashes": rows, "full_disks": full}, indent=1))
    if lost or len(right) < len(full):
        raise SystemExit(1)
