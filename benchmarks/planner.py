"""The planner against published partitioning problems, brute force, graphs of 5,000 nodes, and on captured models.

    OMP_NUM_THREADS=1 python benchmarks/planner.py                        # everything, a few minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/planner.py --brute-force 500      # every assignment of small graphs, minutes
    python benchmarks/planner.py --only published --stages 2 4 --json planner.json

Published problems lie in `../shared/workloads` (--workloads); without them that part is skipped. The load of a stage is
its compute and the transfers over its borders, nothing hidden.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import captured
from brute_force import brute_force, summary
from tabulate import tabulate

from autopipe.partition import partition
from autopipe.partition.baselines import EQUAL_TIME, PIPEDREAM
from autopipe.plan import Plan
from profiler.records import LinkProfile, NodeProfile, Profile

WORKLOADS = Path(__file__).resolve().parents[2] / "shared" / "workloads"
PIPEDREAM_LINK = LinkProfile(latency_us=0.0, bytes_per_us=1e4, overlap=0.0)
TARNAWSKI_LINK = LinkProfile(latency_us=0.0, bytes_per_us=1e6, overlap=0.0)
LARGE_LINK = LinkProfile(latency_us=0.0, bytes_per_us=5e4, overlap=0.0)
Row = dict[str, Any]


def timed(profile: Profile, **arguments: Any) -> tuple[Plan, float]:
    """A plan, and the CPU seconds that it took."""
    start = time.process_time()
    plan = partition(profile, **arguments)
    return plan, time.process_time() - start


def published(workloads: Path, stages: list[int], budget_s: float) -> Iterator[Row]:
    """Largest load over the best one known."""
    best = json.loads((workloads / "best_known.json").read_text())
    for name in best:
        profile, link = load(workloads / f"{name}.json")
        for num_stages in stages:
            known = best[name][str(num_stages)]
            plan, seconds = timed(
                profile, num_stages=num_stages, link=link, objective="bottleneck", time_budget_s=budget_s
            )
            assert plan.bottleneck_bound_us <= plan.bottleneck_us * (1 + 1e-9)
            yield {
                "problem": name,
                "nodes": len(profile.nodes),
                "stages": num_stages,
                "load over best known": plan.bottleneck_us / known["max_load_us"],
                "best is optimal": known["proved_optimal"],
                "gap": plan.bottleneck_us / plan.bottleneck_bound_us - 1,
                "proved": plan.proved,
                "cpu s": seconds,
            }


def load(path: Path) -> tuple[Profile, LinkProfile]:
    """A published problem and its link."""
    return Profile.load(path), PIPEDREAM_LINK if path.name.startswith("pd_") else TARNAWSKI_LINK


def steps(workloads: Path, stages: list[int], budget_s: float) -> Iterator[Row]:
    """Simulated step of the plan made for it, over that of the plan with the least largest load."""
    for name in sorted(p.stem for p in workloads.glob("pd_*.json")):
        profile, link = load(workloads / f"{name}.json")
        for num_stages in stages:
            for per_stage in (1, 2, 4):
                common = {"num_stages": num_stages, "num_microbatches": per_stage * num_stages, "link": link}
                least, _ = timed(profile, objective="bottleneck", time_budget_s=budget_s, **common)
                plan, seconds = timed(profile, objective="step", time_budget_s=budget_s, **common)
                yield {
                    "problem": name,
                    "stages": num_stages,
                    "micro-batches": per_stage * num_stages,
                    "step over least load's": plan.step_us / least.step_us,
                    "step over equal time's": plan.step_us / baseline_us(plan, EQUAL_TIME),
                    "step over PipeDream's": plan.step_us / baseline_us(plan, PIPEDREAM),
                    "gap": plan.step_us / plan.lower_bound_us - 1,
                    "cpu s": seconds,
                }


def baseline_us(plan: Plan, name: str) -> float:
    """The simulated step of one of a plan's baselines."""
    return next(baseline.step_us for baseline in plan.baselines if baseline.name == name)


def large(budget_s: float) -> Iterator[Row]:
    """Graphs of about 5,000 nodes on 16 stages."""
    for name, profile in (("GPT, 140 layers", deep_gpt()), ("U-Net, 20 levels", long_unet())):
        for objective in ("bottleneck", "step"):
            plan, seconds = timed(profile, num_stages=16, link=LARGE_LINK, objective=objective, time_budget_s=budget_s)
            yield {
                "graph": name,
                "nodes": len(profile.nodes),
                "objective": objective,
                "load gap": plan.bottleneck_us / plan.bottleneck_bound_us - 1,
                "step gap": plan.step_us / plan.lower_bound_us - 1,
                "proved": plan.proved,
                "cpu s": seconds,
            }


class Builder:
    """A profile, node by node; a third of the time is forward."""

    def __init__(self, seed: int, spread: float) -> None:
        self.nodes: list[NodeProfile] = []
        self.random, self.spread = random.Random(seed), spread

    def add(self, ms: float, output: float, params: float, *inputs: int) -> int:
        """Appends a node and gives its number."""
        index, us = len(self.nodes), 1e3 * ms * (1 + self.spread * self.random.random())
        self.nodes.append(
            NodeProfile(
                name=f"n{index}",
                inputs=tuple(f"n{i}" for i in sorted(set(inputs))),
                forward_us=us / 3,
                backward_us=us * 2 / 3,
                output_bytes=int(output),
                saved_bytes=int(output),
                params=(f"w{index}",) if params else (),
                param_bytes=int(params),
            )
        )
        return index

    def linear(self, ms: float, output: float, params: float, x: int) -> int:
        """A weight, as a node of its own, and a product with it."""
        return self.add(ms, output, 0, x, self.add(0, params, params))


def deep_gpt(num_layers: int = 140, seed: int = 0) -> Profile:
    """A GPT, operator by operator; the mask and the positions are read by every layer."""
    g = Builder(seed, 0.02)
    x = g.add(0.1, 16e6, 4e8, g.add(0, 8e4, 0))
    mask, positions = g.add(0.05, 4e6, 0), g.add(0.01, 2e6, 0)
    for _ in range(num_layers):
        h = g.linear(0.05, 16e6, 1e4, x)
        heads = []
        for part in range(3):
            view = g.add(0, 16e6, 0, g.linear(0.4, 16e6, 3e7, h))
            turned = g.add(0.02, 16e6, 0, view)
            heads.append(g.add(0.03, 16e6, 0, turned, positions) if part < 2 else turned)
        scores = g.add(0.05, 32e6, 0, g.add(0.3, 32e6, 0, *heads[:2]), mask)
        weights = g.add(0.05, 32e6, 0, g.add(0.1, 32e6, 0, scores))
        x = g.add(0.03, 16e6, 0, x, g.linear(0.4, 16e6, 3e7, g.add(0.3, 16e6, 0, weights, heads[2])))
        up = g.linear(1.6, 64e6, 12e7, g.linear(0.05, 16e6, 1e4, x))
        x = g.add(0.03, 16e6, 0, x, g.linear(1.6, 16e6, 12e7, g.add(0.1, 64e6, 0, up)))
    g.add(4.0, 6e8, 4e8, g.add(0.05, 16e6, 0, x))
    return Profile(nodes=tuple(g.nodes))


def long_unet(levels: int = 10, blocks: int = 24, seed: int = 0) -> Profile:
    """A U-Net whose every block hands its output to the mirrored block; the time embedding is read by all."""
    g = Builder(seed, 0.1)
    x = g.add(0, 1e6, 0)
    embedding = g.add(0.2, 1e5, 1e6, x)
    skips: list[int] = []
    for level in range(2 * levels):
        depth = level if level < levels else 2 * levels - 1 - level
        output, ms = 2e7 / 1.3**depth, 0.5 * 1.05**depth
        for _ in range(blocks):
            if level >= levels:
                x = g.add(0.02, 2 * output, 0, x, skips.pop())
            h = g.linear(ms, output, 1e7, g.add(0.02, output, 0, g.add(0.05, output, 1e4, x)))
            h = g.add(0.03, output, 0, h, g.add(0.01, 1e4, 1e5, embedding))
            x = g.add(0.03, output, 0, x, g.linear(ms, output, 1e7, g.add(0.05, output, 0, h)))
            if level < levels:
                skips.append(x)
    return Profile(nodes=tuple(g.nodes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("published", "steps", "large", "captured", "recompute"))
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--workloads", type=Path, default=WORKLOADS)
    parser.add_argument("--time-budget-s", type=float, default=8.0)
    parser.add_argument(
        "--brute-force", type=int, metavar="N", help="against all assignments of N small graphs; nothing else"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.brute_force:
        rows = list(brute_force(args.brute_force))
        print(tabulate(summary(rows), headers="keys", floatfmt=".6f"))
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
        return
    there = (args.workloads / "best_known.json").is_file()
    parts = {
        "published": (lambda: published(args.workloads, args.stages, args.time_budget_s)) if there else None,
        "steps": (lambda: steps(args.workloads, args.stages, args.time_budget_s / 4)) if there else None,
        "large": lambda: large(args.time_budget_s),
        "captured": lambda: captured.plans(args.stages, args.time_budget_s / 4),
        "recompute": lambda: captured.recompute(args.time_budget_s / 4),
    }
    results = {}
    for name, part in parts.items():
        if args.only in (None, name):
            if part is None:
                print(f"{name}: skipped, no best_known.json in {args.workloads}\n")
                continue
            results[name] = list(part())
            print(f"{name}\n{tabulate(results[name], headers='keys', floatfmt='.5f')}\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
