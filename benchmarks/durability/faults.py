"""Faults of every kind, phase and rank on 2 to 4 processes: is the right stage named on every living rank, how soon, is
anything left.

    python -m benchmarks.durability faults                    # 100 faults, about ten minutes on 2 cores
    python -m benchmarks.durability faults --count 12 --json faults.json

Each fault is a training run of its own (`faulty.py`), in which one rank raises, is killed, is stopped, is slow, or
holds Python's lock, in one phase of its ninth step. A stopped rank is continued once the others have ended: it has to
name itself, and to end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.durability import faulty
from benchmarks.durability.faulty import PHASES, WAYS

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "torch.distributed", "autopipe", "benchmarks.durability.faulty"])
HEARTBEAT_S = 1.0
WITHIN_S = {"raise": 2.0, "kill": 2.0, "stop": HEARTBEAT_S + 2.0}
TIMEOUT_S = 120.0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of a fault.

    Attributes:
        seconds: from the fault to the error, on the living rank that raised last; None where none is due.
        wrong: what was not as it has to be; empty where all was.
        orphans: processes that did not end by themselves.
    """

    fault: dict[str, Any]
    seconds: float | None
    orphans: int
    wrong: list[str] = field(default_factory=list)


def faults(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` different faults, each way as often as the others, in an order that depends on the seed alone."""
    by_way: dict[str, list[dict[str, Any]]] = {how: [] for how in WAYS}
    for world, phase, how in itertools.product((2, 3, 4), PHASES, WAYS):
        for rank in range(world):
            if phase != "loss" or rank == world - 1:
                by_way[how].append({"world": world, "rank": rank, "phase": phase, "how": how})
    for place, them in enumerate(by_way.values()):  # each way has as many
        random.Random(seed + place).shuffle(them)
    return list(itertools.islice((f for round_ in zip(*by_way.values(), strict=True) for f in round_), count))


def run(fault: dict[str, Any]) -> Outcome:
    """Runs one fault."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            FORKSERVER.Process(target=faulty.main, args=(fault, rank, port, folder, HEARTBEAT_S))
            for rank in range(fault["world"])
        ]
        for process in processes:
            process.start()
        orphans = ended(fault, processes)
        said = {r: lines(Path(folder, f"{r}.json")) for r in range(fault["world"])}
        log = "".join(p.read_text() for p in sorted(Path(folder).glob("*.log")))
    return judged(fault, said, log, orphans)


def ended(fault: dict[str, Any], processes: list[Any]) -> int:
    """Waits for all ranks, for a stopped one last; how many had to be killed."""
    deadline, orphans = time.monotonic() + TIMEOUT_S, 0
    stopped = fault["rank"] if fault["how"] == "stop" else -1
    for rank in sorted(range(fault["world"]), key=lambda r: r == stopped):
        if rank == stopped:
            os.kill(processes[rank].pid, signal.SIGCONT)
        processes[rank].join(max(1.0, deadline - time.monotonic()))
        if processes[rank].is_alive():
            orphans += 1
            processes[rank].kill()
            processes[rank].join()
    return orphans


def lines(file: Path) -> dict[str, Any]:
    """What a rank has left in its file, in one mapping."""
    found: dict[str, Any] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        found |= json.loads(line)
    return found


def judged(fault: dict[str, Any], said: dict[int, dict[str, Any]], log: str, orphans: int) -> Outcome:
    """Compares what the ranks said with what they have to."""
    struck, how = said[fault["rank"]].get("struck"), fault["how"]
    outcome = Outcome(fault=fault, seconds=None, orphans=orphans)
    if struck is None:
        outcome.wrong.append(f"the fault did not happen: {log[-600:]}")
        return outcome
    if how in ("slow", "hold the lock"):
        outcome.wrong += [f"rank {r} did not finish: {s}" for r, s in said.items() if "finished" not in s]
        if how == "slow" and f"stage {fault['rank']} on rank {fault['rank']} is slow" not in log:
            outcome.wrong.append("no warning that names the slow stage")
        if how == "hold the lock" and "its process runs" not in log and fault["rank"] != 0:
            outcome.wrong.append("no warning of the silent rank")  # on rank 0 it is the board that is silent
        return outcome
    own = fault["phase"] == "between steps" and how == "raise"  # its own exception ends that script
    due = [r for r in said if not (r == fault["rank"] and (own or how == "kill"))]
    for rank in due:
        message = said[rank].get("message", "")
        named = f"rank {fault['rank']}" in message and f"rank {fault['rank']}" == first_rank(message)
        if not named or (how == "raise" and "a fault that was asked for" not in message):
            outcome.wrong.append(f"rank {rank} says: {message or said[rank]}")
    times = [
        said[r]["raised"] - struck for r in due if "raised" in said[r] and not (r == fault["rank"] and how == "stop")
    ]
    outcome.seconds = max(times, default=None)
    if outcome.seconds is not None and outcome.seconds > WITHIN_S[how]:
        outcome.wrong.append(f"{outcome.seconds:.1f} s")
    return outcome


def first_rank(message: str) -> str:
    """The first rank that a message names."""
    words = message.replace(",", " ").replace(":", " ").replace(";", " ").split()
    return next((f"rank {b}" for a, b in itertools.pairwise(words) if a == "rank"), "")


def main(arguments: list[str]) -> None:
    """Prints a row for each way, and every fault of which something was wrong; exits with 1 where one was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="leave out so many, to go on where a run has ended")
    parser.add_argument("--only", type=json.loads, default=None, help="a JSON list of faults, in the place of a count")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    outcomes = []
    for fault in options.only or faults(options.count)[options.first :]:
        outcomes.append(run(fault))
        print(f"{fault}  {outcomes[-1].seconds}  {outcomes[-1].wrong or 'right'}", file=sys.stderr, flush=True)
    groups = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.fault["how"]].append(outcome)
    rows = [
        {
            "fault": how,
            "times": len(group),
            "right": sum(not o.wrong for o in group),
            "orphan processes": sum(o.orphans for o in group),
            "seconds, median": sorted(s)[len(s) // 2]
            if (s := [o.seconds for o in group if o.seconds is not None])
            else None,
            "seconds, most": max(s, default=None),
        }
        for how, group in groups.items()
    ]
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    for outcome in outcomes:
        if outcome.wrong or outcome.orphans:
            print(outcome.fault, *outcome.wrong, f"{outcome.orphans} orphans", sep="\n  ")
    if options.json:
        found = [{"fault": o.fault, "seconds": o.seconds, "orphans": o.orphans, "wrong": o.wrong} for o in outcomes]
        options.json.write_text(json.dumps({"heartbeat_s": HEARTBEAT_S, "rows": rows, "faults": found}, indent=1))
    sys.exit(1 if any(o.wrong or o.orphans for o in outcomes) else 0)
