"""python benchmarks/saved_bytes.py [NAMES]: bytes that profiles predict to be kept for the backward, against what is
kept.

For each model of `benchmarks/families.py`: the sum over its profile, what the captured graph keeps (the engine runs
that), and what the plain model keeps, by `saved_tensors_hooks`: each storage once, without parameters, buffers and
inputs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import profiler
from autopipe.engine.step.microbatch import split
from autopipe.engine.step.programs import capture_program
from benchmarks.families import CASES, make


def kept_bytes(run: Callable[[], Any], model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """What autograd keeps while the function runs."""
    outside = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *inputs)}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in outside:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(storage.nbytes() for storage in kept.values())


def row(name: str) -> dict[str, Any]:
    """One model."""
    case = make(name, 1)
    microbatch = split(case.args, case.kwargs, case.target, 1)[0]
    inputs = microbatch.tensors(True)
    modes = contextlib.nullcontext
    captured = capture_program(case.model, microbatch, "train", case.loss_fn, check=False, modes=modes)
    graph = captured.graph_module
    profile = profiler.profile(
        graph,
        inputs,
        device="cpu",
        names=dict(captured.names),
        cache=False,
        progress=False,
        budget_s=0,
        calibrate=False,
    )
    loss_fn = case.loss_fn
    assert loss_fn is not None
    predicted = sum(node.saved_bytes for node in profile.nodes)
    of_graph = kept_bytes(lambda: graph(*inputs), case.model, inputs)
    of_model = kept_bytes(lambda: loss_fn(case.model(*case.args, **case.kwargs), case.target), case.model, inputs)
    return {
        "model": name,
        "predicted": predicted,
        "graph": of_graph,
        "error %": 100 * (predicted / of_graph - 1),
        "plain model": of_model,
        "graph over model %": 100 * (of_graph / of_model - 1),
    }


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[1].split(",") if len(sys.argv) > 1 else list(CASES)
    print(tabulate([row(name) for name in names], headers="keys", floatfmt=("", ",.0f", ",.0f", ".3f", ",.0f", ".2f")))


if __name__ == "__main__":
    main()
