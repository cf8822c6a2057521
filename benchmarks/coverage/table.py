"""Results, one JSON line a model, go in; docs/coverage.md and docs/coverage.json come out."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.coverage.pool import read

LISTS = ("transformers", "torchvision", "timm", "hard")
_TITLES = {"hard": "hard cases (`tests/single/hard_cases.py`)"}


def write(results: Path, docs: Path) -> None:
    """Writes both files."""
    everything = {kind: read(results / f"{kind}.jsonl") for kind in LISTS}
    peers = {kind: read(results / f"{kind}-peers.jsonl") for kind in LISTS}
    parts = [
        _HEAD,
        _counts(everything),
        _routes(everything),
        _peers(everything, peers),
        _failures(everything),
        _skipped(everything),
    ]
    (docs / "coverage.md").write_text("\n\n".join(p for p in parts if p) + "\n")
    light = {
        kind: [{k: v for k, v in one.items() if k != "trace"} for one in found.values()]
        for kind, found in everything.items()
    }
    light |= {f"{kind} peers": list(found.values()) for kind, found in peers.items() if found}
    (docs / "coverage.json").write_text(json.dumps(light, indent=0) + "\n")


_HEAD = """# What can be captured

Each model is built at a tiny size and run in a process of its own (`benchmarks/capture_coverage.py`). In train mode the captured graph, whole
and cut at random places into 2 and 4 stages (tensors that cross are detached, gradients go back stage by stage), is compared with
the plain model: outputs, every gradient, every buffer; in eval mode the outputs. *right*: all equal. *refused*: a `CaptureError` that names
module, file and line. *wrong*: another result without a word. *failed*: any other exception, or the time limit. A model that cannot be built
or run plainly here is skipped, with the reason, and does not count."""


def _counts(everything: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| list | models | right | refused | wrong | failed | share right | model types right | skipped | capture, median (s) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, found in everything.items():
        count = Counter(one["outcome"] for one in found.values())
        total = len(found) - count["skipped"]
        if not total:
            continue
        types = len({n.partition(":")[0] for n, one in found.items() if one["outcome"] == "right"})
        times = [one["capture_s_train"] for one in found.values() if "capture_s_train" in one]
        share = 100 * count["right"] / total
        lines.append(
            f"| {_TITLES.get(kind, kind)} | {total} | {count['right']} | {count['refused']} | {count['wrong']} | {count['error']} | {share:.1f} % | "
            f"{types} | {count['skipped']} | {statistics.median(times):.2f} |"
        )
    return "\n".join(lines)


def _routes(everything: dict[str, dict[str, Any]]) -> str:
    lines = [
        "## How they were captured (train mode)",
        "",
        "| list | recorded | recorded, compiling | modules kept whole | guarded | torch.export |",
        "|---|---|---|---|---|---|",
    ]
    for kind, found in everything.items():
        count = Counter(one.get("route_train") for one in found.values() if one["outcome"] == "right")
        if count:
            cells = (count[r] for r in ("recorded", "recorded, compiling", "opaque", "guarded", "exported"))
            lines.append(f"| {kind} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _peers(everything: dict[str, dict[str, Any]], peers: dict[str, dict[str, Any]]) -> str:
    lines = [
        "## torch.export and torch.distributed.pipelining.pipeline on the same models",
        "",
        "Train mode, `strict=False`; `pipeline()` is split in the middle of the longest list of layers.",
        "",
        "| list | models | export right | export refused | export wrong | pipeline right | pipeline refused | pipeline wrong | right there, not here |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, found in peers.items():
        done = {n: one for n, one in found.items() if one["outcome"] == "done"}
        if not done:
            continue
        counts = [Counter(one[p] for one in done.values()) for p in ("export", "pipeline")]
        only = [
            n
            for n, one in done.items()
            if "right" in (one["export"], one["pipeline"])
            and everything[kind].get(n, {}).get("outcome") not in ("right", "skipped")
        ]
        cells = [str(c[o]) for c in counts for o in ("right", "refused", "wrong")]
        lines.append(f"| {kind} | {len(done)} | " + " | ".join(cells) + f" | {', '.join(only) or 'none'} |")
    return "\n".join(lines) if len(lines) > 6 else ""


def _failures(everything: dict[str, dict[str, Any]]) -> str:
    lines = ["## Every model that is not right, and why", "", "| list | model | outcome | cause |", "|---|---|---|---|"]
    for kind, found in everything.items():
        for name, one in sorted(found.items()):
            if one["outcome"] not in ("right", "skipped"):
                lines.append(
                    f"| {kind} | {name} | {one['outcome'].replace('error', 'failed')} | {_cell(one.get('why', ''), 400)} |"
                )
    return "\n".join(lines)


def _skipped(everything: dict[str, dict[str, Any]]) -> str:
    lines = [
        "## Skipped: not built, or not run plainly, in this environment",
        "",
        "| list | model | reason |",
        "|---|---|---|",
    ]
    for kind, found in everything.items():
        for name, one in sorted(found.items()):
            if one["outcome"] == "skipped":
                lines.append(f"| {kind} | {name} | {_cell(one.get('why', ''), 150)} |")
    return "\n".join(lines)


def _cell(text: str, limit: int) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:limit]
