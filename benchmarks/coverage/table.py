"""Results, one JSON line a model, go in; docs/coverage.md and a summary, benchmarks/results/coverage.json, come out."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.coverage.pool import read

LISTS = ("transformers", "torchvision", "timm", "hard")
Results = dict[str, dict[str, Any]]
_TITLES = {"hard": "hard cases (`scenarios/hard_cases/`)"}
_ROUTES = ("recorded", "recorded, compiling", "opaque", "guarded", "exported")


def write(results: Path, root: Path) -> None:
    """Writes both files."""
    everything = {kind: read(results / f"{kind}.jsonl") for kind in LISTS}
    peers = {kind: read(results / f"{kind}-peers.jsonl") for kind in LISTS}
    parts = [
        _HEAD,
        _counts(everything),
        _speed(everything),
        _routes(everything),
        _other_batches(everything),
        _peers(everything, peers),
        _failures(everything),
        _skipped(everything),
        _COMMANDS,
    ]
    (root / "docs" / "coverage.md").write_text("\n\n".join(p for p in parts if p) + "\n")
    summary = {kind: _summary(found) for kind, found in everything.items()}
    summary |= {f"{kind} peers": _peer_counts(found) for kind, found in peers.items() if found}
    (root / "benchmarks" / "results").mkdir(exist_ok=True)
    (root / "benchmarks" / "results" / "coverage.json").write_text(json.dumps(summary, indent=1) + "\n")


_HEAD = """# What can be captured

Each model is built at a tiny size, where it is one that can be made tiny, and run in a process of its own. In train mode the captured
graph, whole and cut at random places into 2 and 4 stages (tensors that cross are detached, gradients go back stage by stage), is compared
with the plain model: outputs, every gradient, every buffer; in eval mode the outputs and buffers. It is then run on a second batch of the
same shapes with other values, and compared again. *right*: all equal. *refused*: an error that names module, file, line and remedy.
*wrong*: another result without a word. *failed*: any other exception, or the limit of processor time. A model that cannot be built, or that does
not run plainly here, is skipped, with the reason, and does not count; nor does one that gives another result under the same seed."""

_COMMANDS = """## How to run it again

```sh
pip install -e '.[hf]' pillow scipy
python benchmarks/capture_coverage.py transformers hard        # with torch 2.13.0 and transformers 5.24.0
python benchmarks/capture_coverage.py torchvision timm         # in an environment with torch 2.14.1, torchvision 0.29.1 and timm 1.0.31
python benchmarks/capture_coverage.py --peers transformers hard torchvision timm
python benchmarks/capture_coverage.py --write                  # this page, and benchmarks/results/coverage.json
python benchmarks/capture_large.py                             # capture of a model of 7 billion parameters
```

Results are kept in `build/coverage/`, one JSON line a model; a second run takes only what has none. `--again refused wrong error skipped`
takes these outcomes again."""


def _counts(everything: dict[str, Results]) -> str:
    lines = [
        "| list | torch | run on | models | right | refused | wrong | failed | share right | kinds right | skipped |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, found in everything.items():
        one = _summary(found)
        if one["models"]:
            cells = (
                one["right"],
                one["refused"],
                one["wrong"],
                one["error"],
                f"{one['share_right']:.1f} %",
                one["kinds_right"],
            )
            lines.append(
                f"| {_TITLES.get(kind, kind)} | {', '.join(one['torch'])} | {', '.join(one['run_on'])} | "
                f"{one['models']} | " + " | ".join(map(str, cells)) + f" | {one['skipped']} |"
            )
    note = "A model of transformers counts once for each attention that it has, eager and sdpa; *kinds* counts its types once."
    return "\n".join(lines) + f"\n\n{note}"


def _summary(found: Results) -> dict[str, Any]:
    count = Counter(one["outcome"] for one in found.values())
    total = len(found) - count["skipped"]
    return {
        "models": total,
        **{outcome: count[outcome] for outcome in ("right", "refused", "wrong", "error", "skipped")},
        "share_right": round(100 * count["right"] / total, 2) if total else None,
        "kinds_right": len({n.partition(":")[0] for n, one in found.items() if one["outcome"] == "right"}),
        "torch": sorted({one["torch"] for one in found.values() if "torch" in one}),
        "run_on": sorted({one["label"] for one in found.values() if "label" in one}),
        "capture_median_s": round(statistics.median(_times(found)), 3) if _times(found) else None,
        "not_right": {
            n: [one["outcome"], one.get("why", "")[:300]]
            for n, one in sorted(found.items())
            if one["outcome"] not in ("right", "skipped")
        },
    }


def _times(found: Results) -> list[float]:
    return [one["capture_s_train"] for one in found.values() if "capture_s_train" in one]


def _speed(everything: dict[str, Results]) -> str:
    lines = [
        "## Seconds to capture",
        "",
        "In a fresh process, on two shared cores, without the self-check; train mode.",
        "",
        "| list | median | nine in ten under | longest |",
        "|---|---|---|---|",
    ]
    for kind, found in everything.items():
        times = sorted(_times(found))
        if times:
            cells = (statistics.median(times), times[int(len(times) * 0.9)], times[-1])
            lines.append(f"| {kind} | " + " | ".join(f"{c:.2f}" for c in cells) + " |")
    lines += [
        "",
        "A Llama configuration of 6.74 billion parameters on the meta device, 1,721 nodes "
        "(`benchmarks/capture_large.py`): 1.1 to 2.3 s",
        "beside other work on both cores; the peak of the process grew by 30 to 46 MiB.",
    ]
    return "\n".join(lines)


def _routes(everything: dict[str, Results]) -> str:
    lines = [
        "## How they were captured",
        "",
        "Train mode; the ways are those of `autopipe/capture/fallbacks.py`. *kept whole*: modules or methods whose "
        "Python reads values are one node",
        "each. *guarded*: what Python read is compared at each run, and an error says where it differs.",
        "",
        "| list | recorded | recorded, compiling | kept whole | guarded | torch.export |",
        "|---|---|---|---|---|---|",
    ]
    for kind, found in everything.items():
        count = Counter(one.get("route_train") for one in found.values() if one["outcome"] == "right")
        if count:
            lines.append(f"| {kind} | " + " | ".join(str(count[r]) for r in _ROUTES) + " |")
    return "\n".join(lines)


def _other_batches(everything: dict[str, Results]) -> str:
    lines = [
        "## The same graph on a batch with other values",
        "",
        "Train mode, of those that are right. *raises*: a guard says what differs. *not taken*: the plain model "
        "fails on the batch too.",
        "",
        "| list | equal | raises | not taken | not tried | those that raise |",
        "|---|---|---|---|---|---|",
    ]
    for kind, found in everything.items():
        right = {n: one for n, one in found.items() if one["outcome"] == "right"}
        count = Counter(one.get("other_train", "not tried") for one in right.values())
        raising = sorted({n.partition(":")[0] for n, one in right.items() if one.get("other_train") == "raises"})
        if right:
            cells = (
                count["equal"],
                count["raises"],
                count["not run"],
                count["not tried"],
                ", ".join(raising) or "none",
            )
            lines.append(f"| {kind} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _peer_counts(found: Results) -> dict[str, Any]:
    done = [one for one in found.values() if one["outcome"] == "done"]
    return {"models": len(done)} | {p: dict(Counter(one[p] for one in done)) for p in ("export", "pipeline")}


def _peers(everything: dict[str, Results], peers: dict[str, Results]) -> str:
    lines = [
        "## torch.export and torch.distributed.pipelining.pipeline on the same models",
        "",
        "Train mode, non-strict, models of transformers without cache (which neither takes among inputs and "
        "outputs). `pipeline()` is split in",
        "the middle of the longest list of layers, and its stages are run one after the other with their gradients "
        "connected. *wrong*: outputs,",
        "gradients or buffers differ from the plain model's under one of three seeds, and nothing was said.",
        "",
        "| list | models | export right | refused | wrong | pipeline right | refused | wrong | right there, not here |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, found in peers.items():
        known = everything[kind]  # a model that was not run here is not compared
        done = {n: one for n, one in found.items() if one["outcome"] == "done" and n in known}
        if not done:
            continue
        counts = _peer_counts(done)
        only = [
            n
            for n, one in done.items()
            if "right" in (one["export"], one["pipeline"]) and known[n]["outcome"] not in ("right", "skipped")
        ]
        cells = [str(counts[p].get(o, 0)) for p in ("export", "pipeline") for o in ("right", "refused", "wrong")]
        lines.append(f"| {kind} | {len(done)} | " + " | ".join(cells) + f" | {', '.join(only) or 'none'} |")
    lines += [
        "",
        "Where every model of a list is right here, there is none that they handle and this does not.",
    ]
    return "\n".join(lines) if len(lines) > 11 else ""


def _failures(everything: dict[str, Results]) -> str:
    lines = ["## Every model that is not right, and why", "", "| list | model | outcome | cause |", "|---|---|---|---|"]
    for kind, found in everything.items():
        for name, one in sorted(found.items()):
            if one["outcome"] not in ("right", "skipped"):
                outcome = one["outcome"].replace("error", "failed")
                lines.append(f"| {kind} | {name} | {outcome} | {_cell(one.get('why', ''), 400)} |")
    return "\n".join(lines)


def _skipped(everything: dict[str, Results]) -> str:
    lines = ["## Skipped", "", "| list | reason | models |", "|---|---|---|"]
    for kind, found in everything.items():
        reasons = defaultdict[str, set[str]](set)
        for name, one in found.items():
            if one["outcome"] == "skipped":
                reasons[_reason(one.get("why", ""))].add(name.partition(":")[0])
        for reason, names in sorted(reasons.items(), key=lambda pair: -len(pair[1])):
            shown = f"{len(names)} types" if "no sdpa" in reason else ", ".join(sorted(names))
            lines.append(f"| {kind} | {reason} | {shown} |")
    return "\n".join(lines)


_REASONS = (
    ("has no sdpa attention", "counted once: has no sdpa attention"),
    ("million parameters", "not small enough for this machine"),
    ("takes more than", "a step of the plain model takes more than 8 s here"),
    ("requires the|No module named|ImportError", "needs a package that is not here"),
    ("no configuration could", "its configuration has no defaults that build a model"),
    ("differs from itself", "the plain model gives another result under the same seed"),
    ("labels: |text only|query_embeds", "no call was found that the plain model takes"),
    ("not built here", "its class cannot be built from a shrunk configuration"),
)


def _reason(why: str) -> str:
    return next((words for pattern, words in _REASONS if re.search(pattern, why)), _cell(why, 120))


def _cell(text: str, limit: int) -> str:
    text = re.sub(r"/\S*/(site-packages/|(?=scenarios/))", "", " ".join(text.split()))
    return text.replace("|", "\\|")[:limit]
