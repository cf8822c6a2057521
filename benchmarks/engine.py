"""The engine beside its peers: the same layers, split and data under autopipe, torch's Schedule1F1B and DeepSpeed's
pipeline engine.

    python benchmarks/engine.py [compute] [memory] [sleep] [divide] [--rounds 20] [-o FILE]
        [--peers autopipe,eager,auto,torch,deepspeed]

compute: step times on 2 processes, stages of about 0.4 to 20 ms, and a small GPT-2 with dropout; peers in turn within
         each round.
memory:  by how much the peak of each of 3 processes grows from 8 to 64 micro-batches of 4 MB, data apart.
sleep:   stages that sleep, 4 and 8 processes, 8 micro-batches: every schedule with its simulated time, over the link
         that was measured.
divide:  how much longer a backward takes in two parts (the simulator's CPU_SPLIT_SHARE and CPU_SPLIT_NODE_US).

One thread a process, gloo. "autopipe" is under 1F1B, as the others are, "eager" is autopipe under eager 1F1B, "auto"
under the schedule that it takes by itself. "ideal" is (M + K - 1) / M times what the slower stage computes alone
(forward, loss, backward, optimizer), measured in the same rounds; "own" is the same of what its forwards and backwards
took in the step itself, beside the other rank and with other micro-batches in the cache: a step over it is what the
engine adds. Prints tables and writes JSON. Needs deepspeed for its column: `pip install deepspeed`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402

from autopipe.schedule.costs import CPU_SPLIT_NODE_US, CPU_SPLIT_SHARE  # noqa: E402
from benchmarks.pipelines import rounds  # noqa: E402
from benchmarks.pipelines.launch import on_ranks  # noqa: E402
from benchmarks.pipelines.models import Residual, Scale, Transformer  # noqa: E402
from benchmarks.pipelines.sleepers import simulated_s, sleeping_peers, sleeping_schedules  # noqa: E402
from scenarios.sleepers import mean_square  # noqa: E402

NUM_STAGES, NUM_MICROBATCHES = 2, 8
# name, kind of layer, width, shape of a micro-batch without the width, layers of a stage
SIZES = (
    ("mlp 0.4", "mlp", 64, (32,), 2),
    ("mlp 1", "mlp", 128, (32,), 2),
    ("mlp 2", "mlp", 128, (64,), 3),
    ("mlp 4", "mlp", 128, (128,), 3),
    ("mlp 10", "mlp", 256, (80,), 3),
    ("mlp 15", "mlp", 256, (136,), 3),
    ("mlp 20", "mlp", 256, (184,), 3),
    ("gpt2 dropout", "gpt", 128, (4, 64), 2),
)
DEEP = (
    ("mlp deep", "mlp", 64, (32,), 6),
    ("mlp 40", "mlp", 256, (160,), 6),
    ("gpt2 small", "gpt", 64, (2, 32), 2),
    ("gpt2 deep", "gpt", 64, (2, 32), 24),
)
FREED_GOES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
"""So that what a process holds is what it uses."""
OURS = ("autopipe", "eager", "auto")
KINDS = {"mlp": Residual, "gpt": Transformer, "scale": Scale}


def make(kind: str, width: int, shape: tuple[int, ...], each: int, num_stages: int, num_microbatches: int) -> Any:
    """Layers, batch, target and loss, the same on every rank."""
    torch.manual_seed(0)
    layers = [KINDS[kind](width) for _ in range(each * num_stages)]
    batch = torch.randn(shape[0] * num_microbatches, *shape[1:], width)
    return layers, batch, torch.randn_like(batch), mean_square


def compute(peers: tuple[str, ...], num_rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, kind, width, shape, each in SIZES:
        built = partial(make, kind, width, shape, each, NUM_STAGES, NUM_MICROBATCHES)
        ranks = on_ranks(rounds.compare, NUM_STAGES, built, NUM_MICROBATCHES, peers, num_rounds)
        alone_ms = max(rounds.median_ms(rank["alone"]) for rank in ranks) / NUM_MICROBATCHES
        ideal_ms = (NUM_MICROBATCHES + NUM_STAGES - 1) * alone_ms
        times = {n: [max(both) for both in zip(*(r["times"][n] for r in ranks), strict=True)] for n in peers}
        medians = {n: rounds.median_ms(t) for n, t in times.items()}
        row: dict[str, Any] = {"stages": name, "stage ms": alone_ms, "ideal ms": ideal_ms}
        for n in peers:
            low, _, high = statistics.quantiles(times[n], n=4)
            row |= {f"{n} ms": medians[n], f"{n} quartiles": f"{1e3 * low:.1f} to {1e3 * high:.1f}"}
        for ours in (n for n in peers if n in OURS):
            row[f"{ours} over ideal"] = medians[ours] / ideal_ms
            busy = [max(both) for both in zip(*(r["computes"][ours] for r in ranks), strict=True)]
            slots = 1 + (NUM_STAGES - 1) / NUM_MICROBATCHES
            shares = [t / (slots * b) for t, b in zip(times[ours], busy, strict=True)]
            row[f"{ours} over own"] = statistics.median(shares)
            row |= {f"{ours} of {n}": medians[ours] / medians[n] for n in peers if n not in OURS}
        row |= {f"{n} is": schedule for n, schedule in ranks[0]["schedules"].items() if n == "auto"}
        if kind == "mlp":  # peers draw other random numbers
            losses = [ranks[-1]["losses"][n] for n in peers]
            assert all(torch.allclose(torch.tensor(x), torch.tensor(losses[0]), rtol=1e-5) for x in losses), losses
        rows.append(row)
        print(f"{name}: {row}", file=sys.stderr, flush=True)
    return rows


def memory(peers: tuple[str, ...], num_rounds: int) -> list[dict[str, Any]]:
    """Under 1F1B alone: others hold more where there are more stages, not more micro-batches."""
    peers = tuple(n for n in peers if n not in OURS[1:])
    peaks: dict[tuple[str, int], list[float]] = {}
    for n in peers:
        for count in (8, 64):
            built = partial(make, "scale", 64, (16384,), 1, 3, count)
            peaks[n, count] = on_ranks(rounds.peak_memory, 3, built, count, n, environment=FREED_GOES_BACK)
            print(f"{n}, {count} micro-batches: {peaks[n, count]} MB", file=sys.stderr, flush=True)
    return [{"rank": r} | {f"{n} MB": peaks[n, 64][r] - peaks[n, 8][r] for n in peers} for r in range(3)]


def sleep(peers: tuple[str, ...], num_rounds: int) -> list[dict[str, Any]]:
    rows = []
    for num_ranks in (4, 8):
        ranks = on_ranks(sleeping_schedules, num_ranks, num_rounds)
        others = on_ranks(sleeping_peers, num_ranks, tuple(n for n in peers if n not in OURS), num_rounds)
        _, plans, _ = ranks[0]
        nap_s = statistics.median(nap for _, _, nap in ranks)
        for times, plan_of, label in (
            ([times for times, _, _ in ranks], plans, "autopipe {0}"),
            (others, dict.fromkeys(others[0], plans["1f1b"]), "{0} 1f1b"),
        ):
            for name, plan in plan_of.items():
                took = rounds.median_ms([max(r) for r in zip(*(rank[name] for rank in times), strict=True)])
                expected = 1e3 * simulated_s(plan, nap_s)
                row = {"step ms": took, "simulated ms": expected, "over simulated": took / expected}
                rows.append({"processes": num_ranks, "schedule": label.format(name)} | row)
    return rows


def divide(peers: tuple[str, ...], num_rounds: int) -> list[dict[str, Any]]:
    """Of the last stage, which also computes the loss: one node more."""
    rows = []
    for name, kind, width, shape, each in (*SIZES, *DEEP):
        built = partial(make, kind, width, shape, each, NUM_STAGES, NUM_MICROBATCHES)
        *_, (nodes, times) = on_ranks(rounds.divided, NUM_STAGES, built, NUM_MICROBATCHES, num_rounds)
        whole, inputs, weights = (rounds.median_ms(times[kind]) for kind in "BIW")
        row = {"stages": name, "nodes": nodes, "whole ms": whole, "inputs ms": inputs, "weights ms": weights}
        longer = {
            "longer by ms": inputs + weights - whole,
            "expected ms": CPU_SPLIT_SHARE * whole + CPU_SPLIT_NODE_US * nodes / 1e3,
        }
        rows.append(row | longer)
        print(f"{name}: {rows[-1]}", file=sys.stderr, flush=True)
    return rows


PARTS = {"compute": compute, "memory": memory, "sleep": sleep, "divide": divide}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them where none is named")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peers", default="autopipe,eager,auto,torch,deepspeed")
    parser.add_argument("-o", "--output", type=Path, default=Path("engine.json"))
    options = parser.parse_args()
    peers = tuple(options.peers.split(","))
    if importlib.util.find_spec("deepspeed") is None:
        peers = tuple(p for p in peers if p != "deepspeed")
    results = {name: PARTS[name](peers, options.rounds) for name in options.parts or PARTS}
    for name, rows in results.items():
        print(f"\n{name}\n{tabulate(rows, headers='keys', floatfmt='.3g')}")
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}
    load = {"load average": os.getloadavg()[0]}
    options.output.write_text(json.dumps({**machine, **load, "rounds": options.rounds, **results}, indent=1))


if __name__ == "__main__":
    main()
