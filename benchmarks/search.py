"""python benchmarks/search.py: the search for 8 and 64 devices on a captured GPT: its tables, its time, and an
exhaustive small grid.

The GPT (24 layers, width 1024, sequence 1024) is captured on `meta` and estimated for h100 at micro-batches of 2 and 4
samples, so that times of other sizes lie on a line. Nodes of 8 devices, NVLink within, 400 Gbit/s for each device
between. Needs the extra [hf].
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

import profiler
from autopipe.capture import capture
from autopipe.cluster import Cluster, Device
from autopipe.partition import partition
from autopipe.partition.cluster.device_layouts import layouts, on_cluster
from autopipe.partition.cluster.strategy_search import SearchSpace, search
from autopipe.plan import Plan
from autopipe.report.candidates import why
from autopipe.simulate import fastest_schedule, simulate
from profiler.records import LinkProfile, Profile
from profiler.sizes import at_size, check_sizes

NVLINK = LinkProfile(latency_us=5.0, bytes_per_us=450_000.0, measured=False)
NETWORK = LinkProfile(latency_us=15.0, bytes_per_us=50_000.0, measured=False)
SAMPLES_PER_DEVICE = 8


def gpt_profiles(num_layers: int) -> tuple[Profile, ...]:
    """Estimates of the captured GPT at two micro-batch sizes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=num_layers, n_embd=1024, n_head=16))
    found = []
    for size in (2, 4):
        ids = torch.zeros(size, 1024, dtype=torch.long, device="meta")
        batch = {"input_ids": ids, "labels": ids}
        captured = capture(model, (), batch).loss_only()
        values = captured.flatten((), batch)
        found.append(profiler.estimate(captured.graph_module, values, device="h100", names=captured.names))
    return check_sizes(found)


def cluster_of(num_devices: int, memory_gib: int) -> Cluster:
    """Nodes of 8 devices, or a part of one."""
    per_node = min(num_devices, 8)
    device = Device(memory_bytes=memory_gib * 2**30)
    return Cluster.even(num_devices, NVLINK, devices_per_node=per_node, between=NETWORK, device=device)


def grid_steps_us(profiles: tuple[Profile, ...], cluster: Cluster, batch: int, limit: int) -> list[float]:
    """Every layout and number of micro-batches, each planned by itself with the full budget, and played under its
    fastest schedule."""
    steps, num_devices = [], len(cluster.devices)
    for replicas in (d for d in range(1, num_devices + 1) if num_devices % d == 0 and batch % d == 0):
        ranks = num_devices // replicas
        for layout in layouts(cluster, replicas):
            for count in (m for m in range(1, batch // replicas + 1) if batch // replicas % m == 0):
                sized = at_size(profiles, batch // replicas // count)
                try:
                    plan = partition(
                        sized,
                        num_stages=ranks,
                        num_microbatches=count,
                        data_parallel=replicas,
                        link=NVLINK,
                        memory_limit=limit,
                    )
                except ValueError:
                    continue  # it does not fit
                placed = dataclasses.replace(plan, ranks=layout.ranks)
                steps.append(simulate(fastest_schedule(on_cluster(placed, cluster))).makespan_us)
    return steps


def timed(profiles: tuple[Profile, ...], cluster: Cluster, batch: int) -> tuple[Plan, float]:
    """The plan, and the CPU seconds that the search took."""
    start = time.process_time()
    plan = search(profiles, cluster, SearchSpace(global_batch=batch))
    return plan, time.process_time() - start


def show(plan: Plan) -> None:
    """The candidates, and why the first wins."""
    for candidate in plan.candidates:
        c = candidate
        print(
            f"  {c.data_parallel:3d} x {c.num_ranks:3d} ranks, {c.num_stages:3d} stages, {c.num_microbatches:3d} x "
            f"{c.microbatch_size:2d} samples, "
            f"{c.schedule:11s} ZeRO-{c.zero_stage} {c.placement:8s} {c.step_us / 1e3:9.1f} ms (not below "
            f"{c.lower_bound_us / 1e3:.1f})"
        )
    print(f"  {why(plan)}\n")


def main() -> None:
    """Prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--memory-gib", type=int, nargs="+", default=[80, 16])
    parser.add_argument("--grid", action="store_true", help="also the exhaustive grid for 4 devices")
    parser.add_argument("-o", "--output", default="search.json")
    options = parser.parse_args()
    profiles = gpt_profiles(options.layers)
    results: list[dict[str, Any]] = []
    for memory in options.memory_gib:
        for devices in options.devices:
            batch = SAMPLES_PER_DEVICE * devices
            plan, seconds = timed(profiles, cluster_of(devices, memory), batch)
            print(f"{devices} devices of {memory} GiB, {batch} samples a step: {seconds:.1f} CPU s")
            show(plan)
            results.append({"devices": devices, "memory_gib": memory, "seconds": seconds, "step_us": plan.step_us})
            results[-1]["candidates"] = [dataclasses.asdict(c) for c in plan.candidates]
    if options.grid:
        cluster = cluster_of(4, options.memory_gib[0])
        plan, seconds = timed(profiles, cluster, 32)
        steps = grid_steps_us(profiles, cluster, 32, options.memory_gib[0] * 2**30)
        print(
            f"4 devices: {plan.step_us / 1e3:.2f} ms, the best of {len(steps)} plans of the grid "
            f"{min(steps) / 1e3:.2f} ms"
        )
        results.append({"grid": len(steps), "best_us": min(steps), "step_us": plan.step_us})
    Path(options.output).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
