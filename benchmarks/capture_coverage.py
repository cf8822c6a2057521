"""Which models can be captured: every list of models, each model in a process of its own, compared with the plain
model.

    python benchmarks/capture_coverage.py transformers hard     # runs what has no result yet, into build/coverage/
    python benchmarks/capture_coverage.py --peers transformers  # the same models through torch.export and pipeline()
    python benchmarks/capture_coverage.py --write               # docs/coverage.md and benchmarks/results/coverage.json

torchvision and timm need a torch of their own: run these lists in that environment, and `--write` in either.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "build" / "coverage"


def work(kind: str, peers: bool, label: str, out: Path, name: str) -> dict[str, Any]:
    """One model, in a process of its own."""
    import torch

    from benchmarks.coverage import build, pool
    from benchmarks.coverage import peers as others
    from scenarios import comparison

    warnings.simplefilter("ignore")
    stamp = {"torch": torch.__version__, "label": label}
    twin = pool.read(out).get(name.replace(":sdpa", ":eager"), {})
    if twin.get("label") == label and str(twin.get("why")).startswith("not built here"):
        return stamp | {"outcome": "skipped", "why": twin["why"]}
    try:
        model, args, kwargs = build.LISTS[kind][1](name)
    except build.CannotBuild as cause:
        return stamp | {"outcome": "skipped", "why": f"not built here: {cause}"}
    return stamp | (others.check(model, args, kwargs) if peers else comparison.check(model, args, kwargs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="*", help="transformers, torchvision, timm, hard")
    parser.add_argument("--only", nargs="*", default=[], help="names that contain one of these")
    parser.add_argument(
        "--peers", action="store_true", help="torch.export and torch.distributed.pipelining.pipeline instead"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=240, help="processor time")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="start no model after this time")
    parser.add_argument(
        "--again", nargs="*", default=[], help="outcomes of other labels to run again: skipped, refused, ..."
    )
    parser.add_argument("--label", default=datetime.date.today().isoformat(), help="kept with each result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--write", action="store_true", help="write docs/coverage.md and benchmarks/results/coverage.json"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for kind in options.lists:
        for module in [
            *{"transformers": ["transformers"], "hard": []}.get(kind, [kind]),
            "autopipe",
            "torch.distributed.pipelining",
        ]:
            importlib.import_module(module)
        from benchmarks.coverage import build, pool

        out = options.out / f"{kind}{'-peers' if options.peers else ''}.jsonl"
        done = {
            n
            for n, one in pool.read(out).items()
            if one["outcome"] not in options.again or one.get("label") == options.label
        }
        if options.peers:  # what could not be built is not built again
            done |= {n for n, one in pool.read(options.out / f"{kind}.jsonl").items() if one["outcome"] == "skipped"}
        names = [n for n in build.LISTS[kind][0]() if not options.only or any(o in n for o in options.only)]
        names = [n for n in names if n not in done]
        run = functools.partial(work, kind, options.peers, options.label, out)
        left = pool.run_all(names, run, out, options.workers, options.limit_s, options.budget_s)
        print(f"{kind}: {left} left", flush=True)
    if options.write:
        from benchmarks.coverage import table

        table.write(options.out, ROOT)


if __name__ == "__main__":
    main()
