"""Parts of `benchmarks/planner.py` on captured models: plans beside the usual splits, and recompute under a cap of
memory.

Times are estimated for an A100 by the roofline of `profiler.estimate`, so that the figures are the same on every
machine.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from models import gpt, resnet101

import profiler
from autopipe.capture import capture
from autopipe.errors import PartitionError
from autopipe.partition import partition
from autopipe.partition.baselines import EQUAL_NODES, EQUAL_PARAMETERS, EQUAL_TIME, PIPEDREAM
from profiler.records import LinkProfile, Profile

LINK = LinkProfile(latency_us=10.0, bytes_per_us=25_000.0, overlap=1.0)
MODELS: dict[str, Callable[[], Any]] = {
    "ResNet-101, 8 images": functools.partial(resnet101, 8),
    "GPT-2 small, 4 x 1024": functools.partial(gpt, 4, 1024),
    "GPT-2 XL, 4 x 1024": functools.partial(gpt, 4, 1024, width=1600, layers=48, heads=25),
}
CAPPED = ("ResNet-101, 8 images", "GPT-2 XL, 4 x 1024")
SHARES = (0.5, 0.3)
Row = dict[str, Any]


@functools.cache
def captured(name: str) -> Profile:
    """The estimated profile of a model, captured on meta."""
    with torch.device("meta"):
        model, args = MODELS[name]()
    found = capture(model, args, check=False).loss_only()
    return profiler.estimate(found.graph_module, found.flatten(args, {}), device="a100", names=dict(found.names))


def plans(stages: list[int], budget_s: float) -> Iterator[Row]:
    """Steps of captured models, over those of the usual splits."""
    for name in MODELS:
        profile = captured(name)
        for K in stages:
            start = time.process_time()
            plan = partition(profile, num_stages=K, num_microbatches=4 * K, link=LINK, time_budget_s=budget_s)
            seconds = time.process_time() - start
            others = {b.name: plan.step_us / b.step_us for b in plan.baselines}
            yield {
                "model": name,
                "nodes": len(profile.nodes),
                "stages": K,
                "step gap": plan.step_us / plan.lower_bound_us - 1,
                "over equal nodes": others[EQUAL_NODES],
                "over equal parameters": others[EQUAL_PARAMETERS],
                "over equal time": others[EQUAL_TIME],
                "over PipeDream": others[PIPEDREAM],
                "cpu s": seconds,
            }


def recompute(budget_s: float) -> Iterator[Row]:
    """Steps under a share of the memory that the plan without a cap needs, over the step without one; K = 4, M = 16,
    SGD."""
    for name in CAPPED:
        profile = captured(name)
        common = {
            "num_stages": 4,
            "num_microbatches": 16,
            "link": LINK,
            "optimizer": "sgd",
            "time_budget_s": budget_s,
        }
        free = partition(profile, **common)
        peak = max(stage.peak_bytes for stage in free.stages)
        for share in SHARES:
            row: Row = {"model": name, "peak without a cap MiB": peak / 2**20, "cap": share}
            for way in ("none", "full", "auto"):
                start = time.process_time()
                try:
                    plan = partition(profile, memory_limit=share * peak, recompute=way, **common)
                    row[f"step, recompute {way}"] = plan.step_us / free.step_us
                except PartitionError:
                    row[f"step, recompute {way}"] = "does not fit"
                row["cpu s"] = time.process_time() - start
            yield row
