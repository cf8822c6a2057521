"""What a rank holds: the growth of its peak memory while it takes its stage of a model on the meta device, beside the
stage's bytes."""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import autopipe
from autopipe.plan import Plan
from scenarios.launch import run_ranks
from scenarios.pipelines import TiedGPT
from scenarios.resident_memory import resident, restart_peak

MIB = 2**20
SOURCES = ("measuring", "reset_parameters", "safetensors", "torch")
"""The first measures the model, the others take its plan."""


def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def start(model: nn.Module, weights: str | None, ids: torch.Tensor, plan: Plan | None = None) -> Any:
    return autopipe.pipeline(
        model,
        (ids,),
        example_target=ids,
        loss_fn=loss_fn,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        num_microbatches=2,
        weights=weights,
        plan=plan,
        seed=0,
    )


def one_rank(width: int, layers: int, weights: str | None, plan: Plan | None) -> dict[str, Any]:
    """Growth of this rank's peak, in bytes, over the start of an engine; the bytes of its stage's parameters.

    Without a plan the model is measured too, a few layers at a time.
    """
    ids = torch.randint(0, 50, (2, 8))
    small = start(TiedGPT(layers=4), None, ids)  # what the first engine of a process loads is no part of a stage
    small.train_batch(ids, target=ids)
    restart_peak()
    before = resident("VmRSS")
    with torch.device("meta"):
        model = TiedGPT(width=width, layers=layers)
    engine = start(model, weights, ids, plan)
    grown = resident("VmHWM") - before
    held = sum(p.nbytes for p in engine.parameters())
    restart_peak()
    engine.train_batch(ids, target=ids)
    predicted = engine.plan.stages[engine.stage].peak_bytes
    result = {
        "plan": engine.plan,
        "stage": engine.stage,
        "stage_bytes": held,
        "grown_bytes": grown,
        "ratio": grown / held,
        "step_bytes": resident("VmHWM") - before,
        "plan_peak_bytes": predicted,
    }
    engine.close()
    return result


def whole_bytes(width: int, layers: int) -> int:
    with torch.device("meta"):
        return sum(p.nbytes for p in TiedGPT(width=width, layers=layers).parameters())


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    plan = None
    with tempfile.TemporaryDirectory() as folder:
        for source in options.sources:
            weights = None
            if source in ("safetensors", "torch"):
                weights = str(Path(folder) / f"model.{'safetensors' if source == 'safetensors' else 'pt'}")
                save(TiedGPT(width=options.width, layers=options.layers), Path(weights))
            for row in run_ranks(
                one_rank, options.ranks, options.width, options.layers, weights, plan, timeout_s=480.0
            ):
                plan = row.pop("plan")
                rows.append({"source": source, **row})
    total = whole_bytes(options.width, options.layers)
    print(f"model of {total / MIB:.0f} MiB on {options.ranks} ranks")
    print("source            stage  stage MiB  growth MiB  ratio  a step MiB  plan's peak MiB")
    for r in rows:
        mib = {k: v / MIB for k, v in r.items() if k.endswith("bytes")}
        print(
            f"{r['source']:16s}  {r['stage']:5d}  {mib['stage_bytes']:9.1f}  {mib['grown_bytes']:10.1f}  "
            f"{r['ratio']:5.2f}"
            f"  {mib['step_bytes']:10.1f}  {mib['plan_peak_bytes']:15.1f}"
        )
    if options.output:
        options.output.write_text(json.dumps({"model_bytes": total, "rows": rows}, indent=1))


def save(model: nn.Module, path: Path) -> None:
    if path.suffix == ".pt":
        torch.save(model.state_dict(), path)
    else:
        from safetensors.torch import save_model

        save_model(model, str(path))
