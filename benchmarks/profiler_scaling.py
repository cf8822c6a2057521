"""python benchmarks/profiler_scaling.py [-o FILE] [--llama]: time and memory of profiling, against depth and size.

Rows: a GPT of 2, 12, 48 and 96 layers of one width, measured without a cache, each row's time over that of 2 layers;
with `--llama` a Llama of 7 billion parameters on `meta` (sequence 1024, micro-batch 1), measured on this CPU and
estimated for h100. Prints a table and writes JSON. Each row runs in a process of its own, so that its peak memory is
its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.nn import functional as F

import profiler


def heads(x: Tensor, num: int) -> Tensor:
    return x.unflatten(-1, (num, -1)).transpose(1, 2)


class GptBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        a = F.scaled_dot_product_attention(
            heads(self.query(y), 4), heads(self.key(y), 4), heads(self.value(y), 4), is_causal=True
        )
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class LlamaBlock(nn.Module):
    def __init__(self, width: int, inner: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.half = num_heads, width // num_heads // 2
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + torch.cat((-x[..., self.half :], x[..., : self.half]), -1) * sin

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (heads(linear(y), self.num_heads) for linear in (self.query, self.key, self.value))
        a = F.scaled_dot_product_attention(self.rotated(q, cos, sin), self.rotated(k, cos, sin), v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, head, loss; Llama's with rotary tables as buffers."""

    def __init__(
        self, blocks: list[nn.Module], width: int, vocabulary: int, length: int, head_width: int | None
    ) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(vocabulary, width), nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.has_tables = head_width is not None
        if head_width is not None:
            self.register_buffer("cos", torch.ones(length, head_width))
            self.register_buffer("sin", torch.zeros(length, head_width))

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin) if self.has_tables else block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), target.flatten())


def gpt(num_layers: int) -> tuple[fx.GraphModule, tuple[Tensor, Tensor]]:
    width, length = 256, 128
    model = LanguageModel([GptBlock(width) for _ in range(num_layers)], width, 1000, length, None)
    ids = torch.randint(0, 1000, (4, length))
    return fx.symbolic_trace(model), (ids, ids)


def llama() -> tuple[fx.GraphModule, tuple[Tensor, Tensor]]:
    width, inner, num_heads, length = 4096, 11008, 32, 1024
    with torch.device("meta"):
        blocks: list[nn.Module] = [LlamaBlock(width, inner, num_heads) for _ in range(32)]
        model = LanguageModel(blocks, width, 32000, length, width // num_heads)
    ids = torch.zeros(1, length, dtype=torch.long)
    return fx.symbolic_trace(model), (ids, ids)


def row(name: str) -> dict[str, Any]:
    """Profiles one model; runs in a process of its own."""
    kind, _, number = name.partition(" ")
    graph_module, args = gpt(int(number)) if kind == "gpt" else llama()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    if number == "estimated":
        profile = profiler.estimate(graph_module, args, device="h100")
    else:
        profile = profiler.profile(graph_module, args, device="cpu", progress=False, cache=False)
    return {
        "model": name,
        "nodes": len(profile.nodes),
        "profile_s": time.perf_counter() - start,
        "before_gib": before / 2**30,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "step_ms": sum(n.forward_us + n.backward_us for n in profile.nodes) / 1e3,
        "residual": profile.residual,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=Path("profiler_scaling.json"))
    options = parser.parse_args()
    names = [f"gpt {n}" for n in (2, 12, 48, 96)] * options.repeats
    names += ["llama-7b measured", "llama-7b estimated"] if options.llama else []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = [pool.apply(row, (name,)) for name in names]
    rows = []
    for name in dict.fromkeys(names):
        same = [r for r in found if r["model"] == name]
        times = [r["profile_s"] for r in same]
        rows.append({**same[0], "profile_s": statistics.median(times), "least_s": min(times), "most_s": max(times)})
    for r in rows:
        r["over_2_layers"] = r["profile_s"] / rows[0]["profile_s"] if r["model"].startswith("gpt") else None
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    options.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
