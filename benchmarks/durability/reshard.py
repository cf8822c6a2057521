"""A checkpoint of any layout is read by any other: weights and optimizer state bit for bit, and the next losses of the
undisturbed run.

Layouts are stages x replicas, with ZeRO-0 or 1. A run of every layout trains 3 steps, saves, and trains 3 more. Every
other layout loads what it saved, saves it again at once, and trains 3 steps: the two checkpoints must hold the same
bytes, and the losses must be those of the run that went on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import autopipe
from autopipe.checkpoint import RNG, Reader, newest
from scenarios.launch import run_ranks
from scenarios.pipelines import make

LAYOUTS = {  # name: ranks, replicas, ZeRO stage
    "1": (1, 1, 0),
    "2": (2, 1, 0),
    "3": (3, 1, 0),
    "4": (4, 1, 0),
    "2x2": (4, 2, 0),
    "2x2 zero": (4, 2, 1),
    "1x2": (2, 2, 0),
    "1x2 zero": (2, 2, 1),
}
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}
TOLERANCE = 1e-6


def make_engine(layout: str, optimizer: str) -> tuple[Any, Any, Any]:
    _, data_parallel, zero_stage = LAYOUTS[layout]
    model, args, _, target, loss_fn = make("gpt", 12)
    engine = autopipe.pipeline(
        model,
        args,
        example_target=target,
        loss_fn=loss_fn,
        optimizer=OPTIMIZERS[optimizer],
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5),
        num_microbatches=4 // data_parallel,
        data_parallel=data_parallel,
        zero_stage=zero_stage,
        max_grad_norm=1.0,
        seed=3,
    )
    return engine, args, target


def train(engine: Any, args: Any, target: Any) -> list[float]:
    return [float(engine.train_batch(*args, target=target)) for _ in range(3)]


def write(layout: str, optimizer: str, folder: str) -> list[float]:
    """Trains, saves into `folder`, and returns the losses of the three steps after it."""
    engine, args, target = make_engine(layout, optimizer)
    train(engine, args, target)
    engine.save_checkpoint(folder, client_state={"position": 36})
    later = train(engine, args, target)
    engine.close()
    return later


def read(layout: str, optimizer: str, folders: list[str]) -> list[tuple[list[float], Any]]:
    """Loads from each folder, saves at once into `again-LAYOUT` beside, and trains three steps."""
    engine, args, target = make_engine(layout, optimizer)
    results = []
    for folder in folders:
        client = engine.load_checkpoint(folder)
        engine.save_checkpoint(Path(folder) / f"again-{layout}", client_state=client)
        results.append((train(engine, args, target), client))
    engine.close()
    return results


def differing(first: Path, second: Path) -> list[str]:
    """The keys of two checkpoints under which not the same bytes, or not the same options, are stored."""
    a, b = Reader(newest(first)), Reader(newest(second))
    fields = [f for f in ("names", "options", "lr_scheduler", "loss_scale", "seed") if a.meta[f] != b.meta[f]]
    keys = (a.stored.keys() | b.stored.keys()) - {RNG}  # the generator's state moves on while a model is prepared
    return fields + [
        k
        for k in sorted(keys)
        if k not in a.stored or k not in b.stored or a.read(k).numpy().tobytes() != b.read(k).numpy().tobytes()
    ]


def matrix(optimizer: str, layouts: list[str], folder: Path) -> list[dict[str, Any]]:
    """One row for each pair of layouts."""
    undisturbed = {}
    for name in layouts:
        undisturbed[name] = run_ranks(write, LAYOUTS[name][0], name, optimizer, str(folder / name))[0]
        print(f"{optimizer}: {name} has saved", flush=True)
    rows = []
    for name in layouts:
        folders = [str(folder / source) for source in layouts]
        ranks = run_ranks(read, LAYOUTS[name][0], name, optimizer, folders)
        for source, results in zip(layouts, zip(*ranks, strict=True), strict=True):
            expected = undisturbed[source]
            error = max(abs(x - y) / abs(y) for losses, _ in results for x, y in zip(losses, expected, strict=True))
            different = differing(folder / source, folder / source / f"again-{name}")
            rows.append(
                {
                    "optimizer": optimizer,
                    "saved": source,
                    "loaded": name,
                    "different": different,
                    "client_state": all(client == {"position": 36} for _, client in results),
                    "loss_error": error,
                }
            )
        print(f"{optimizer}: {name} has read {len(layouts)}", flush=True)
    return rows


def is_right(row: dict[str, Any]) -> bool:
    return not row["different"] and row["client_state"] and row["loss_error"] <= TOLERANCE


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    for optimizer in options.optimizers:
        with tempfile.TemporaryDirectory() as folder:
            rows += matrix(optimizer, options.layouts, Path(folder))
    for row in rows:
        if not is_right(row):
            print(row)
    right = sum(map(is_right, rows))
    print(
        f"{right} of {len(rows)} pairs right: bytes equal in {sum(not r['different'] for r in rows)}, "
        f"losses within {TOLERANCE} in {sum(r['loss_error'] <= TOLERANCE for r in rows)} "
        f"(largest error {max(r['loss_error'] for r in rows):.1e}); {time.monotonic() - started:.0f} s"
    )
    if options.output:
        options.output.write_text(json.dumps({"rows": rows}, indent=1))
    if right < len(rows):
        raise SystemExit(1)
