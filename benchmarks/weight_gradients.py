"""python benchmarks/weight_gradients.py: the second part of a divided backward in its two ways, over stages of growing
length.

A stage of small transformer layers without dropout: "whole" is its backward in one, "inputs" the first part; then the
second, by a backward from each junction, and by calling the junctions, in turn; medians in milliseconds. The gradients
of all must be the same bits.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from autopipe.engine.step import split_backward  # noqa: E402
from autopipe.engine.step.split_backward import Division, input_gradients  # noqa: E402
from benchmarks.pipelines.models import Transformer  # noqa: E402

WAYS = {"each started": sys.maxsize, "each called": 0}
"""The values of SHORT_PATH under which a stage of any length goes either way."""


def measured(num_layers: int, num_rounds: int = 21) -> dict[str, float]:
    torch.manual_seed(0)
    layers = nn.Sequential(*(Transformer(64, dropout=0.0) for _ in range(num_layers)))
    x, gradient = torch.randn(2, 32, 64, requires_grad=True), torch.randn(2, 32, 64)
    times: dict[str, list[float]] = {}
    found: dict[str, list[Tensor | None]] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
        return result

    def taken(name: str) -> None:
        found[name] = [p.grad for p in (x, *layers.parameters())]
        x.grad = None
        layers.zero_grad()

    for _ in range(num_rounds):
        y = layers(x)
        timed("whole", partial(torch.autograd.backward, [y], [gradient]))
        taken("whole")
        for way, split_backward.SHORT_PATH in WAYS.items():
            y = layers(x)
            rest = timed("inputs", partial(input_gradients, [y], [gradient], [x], Division()))
            timed(way, rest.run)
            taken(way)
            assert all(map(torch.equal, found[way], found["whole"]))
    return {name: statistics.median(t) for name, t in times.items()}


def path_nodes(num_layers: int) -> int:
    """Nodes of the graph from which the input is reached."""
    x = torch.randn(2, 32, 64, requires_grad=True)
    y = nn.Sequential(*(Transformer(64, dropout=0.0) for _ in range(num_layers)))(x)
    root, leaf = (torch.autograd.graph.get_gradient_edge(t).node for t in (y, x))
    return len(split_backward._above([leaf], split_backward._parents([root])))


def main() -> None:
    torch.set_num_threads(1)
    rows = [{"layers": n, "path nodes": path_nodes(n)} | measured(n) for n in (1, 3, 6, 12, 24, 48)]
    print(tabulate(rows, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
    main()
