# python benchmarks/comparison_torch.py
"""What torch.distributed.pipelining does with the cases of `docs/comparison.md`: each is run on gloo processes and
printed.

Each case has a time limit; a case that hangs is printed as such. The table in the document quotes this output.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, SplitPoint, pipeline

sys.path.insert(0, str(Path(__file__).parents[1]))

from autopipe.errors import AutopipeError
from autopipe.verify.processes import run_processes

LIMIT_S = 40.0


class Chain(nn.Module):
    """Four linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Tied(nn.Module):
    """The last layer reads the first one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).tanh()).tanh())


class Skip(nn.Module):
    """The first layer's output is read by the layers named."""

    def __init__(self, num_layers: int, readers: tuple[int, ...]) -> None:
        super().__init__()
        self.layers, self.readers = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_layers)), readers

    def forward(self, x: Tensor) -> Tensor:
        a = x = self.layers[0](x).tanh()
        for i, layer in enumerate(self.layers[1:], 1):
            x = layer(x + a if i in self.readers else x).tanh()
        return x


class Times(nn.Module):
    """A layer over the product of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x * mask)


class Masked(nn.Module):
    """A mask given to the model is read by its second submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), Times()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(self.first(x), mask)


class Norm(nn.Module):
    """A batch norm between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def _traced(model: nn.Module, split: str, *example: Tensor) -> Any:
    pipe = pipeline(model, mb_args=example, split_spec={split: SplitPoint.BEGINNING})
    return pipe.build_stage(dist.get_rank(), torch.device("cpu"))


def _step(stage: Any, count: int, *batch: Tensor) -> None:
    schedule = Schedule1F1B(stage, count, loss_fn=lambda output, target: output.square().mean())
    schedule.step(*(batch if dist.get_rank() == 0 else ()), target=batch[0] if dist.get_rank() == 1 else None)


def accumulate(_: int) -> str:
    """Two steps without zero_grad over one step: 2 is right."""
    halves = Chain().layers[2 * dist.get_rank() : 2 * dist.get_rank() + 2]
    stage = PipelineStage(nn.Sequential(*halves), dist.get_rank(), 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, 8, loss_fn=lambda output, target: output.square().mean())
    x = torch.randn(16, 8)
    norms = []
    for _step_number in range(2):
        schedule.step(*([x] if dist.get_rank() == 0 else []), target=x if dist.get_rank() == 1 else None)
        norms.append(halves[0].weight.grad.norm())
    return f"{float(norms[1] / norms[0]):.3f} times the gradient of one step"


def tied(_: int) -> str:
    """The gradient of a tied weight on this stage over that of the plain model: 1 is right."""
    model, x = Tied(), torch.randn(8, 8)
    for part in x.chunk(4):
        (model(part).square().mean() / 4).backward()
    expected = model.first.weight.grad.clone()
    model.zero_grad()
    stage = _traced(model, "middle", x[:2])
    _step(stage, 4, x)
    got = next(p.grad for n, p in stage.submod.named_parameters() if n.endswith(("first.weight", "last.weight")))
    error = float((got - expected).norm() / expected.norm())
    return f"the stage's gradient is {error:.2f} (relative) off the plain model's"


def _skip(num_stages: int, readers: tuple[int, ...]) -> str:
    model, x = Skip(num_stages, readers), torch.randn(16, 8)
    for part in x.chunk(8):
        (model(part).square().mean() / 8).backward()
    expected = model.layers[0].weight.grad.clone()
    model.zero_grad()
    split = {f"layers.{i}": SplitPoint.BEGINNING for i in range(1, num_stages)}
    stage = pipeline(model, mb_args=(x[:2],), split_spec=split).build_stage(dist.get_rank(), torch.device("cpu"))
    schedule = Schedule1F1B(stage, 8, loss_fn=lambda output, target: output.square().mean())
    schedule.step(*([x] if stage.is_first else []), target=x if stage.is_last else None)
    if not stage.is_first:
        return "runs"
    got = next(p.grad for n, p in stage.submod.named_parameters() if n.endswith("weight"))
    return f"runs; the first layer's gradient is {float((got - expected).norm() / expected.norm()):.2f} (relative) off"


def skip(_: int) -> str:
    """An activation of the first of four stages that the second and the third read."""
    return _skip(4, (3,))


def mask(_: int) -> str:
    """A mask that is an input of the model and read by the second stage."""
    stage = _traced(Masked(), "last", torch.randn(2, 8), torch.ones(2, 8))
    _step(stage, 4, torch.randn(8, 8), torch.ones(8, 8))
    return "runs"


def few(_: int) -> str:
    """One micro-batch on two stages."""
    halves = Chain().layers[2 * dist.get_rank() : 2 * dist.get_rank() + 2]
    _step(PipelineStage(nn.Sequential(*halves), dist.get_rank(), 2, torch.device("cpu")), 1, torch.randn(4, 8))
    return "runs"


def uneven(_: int) -> str:
    """Ten samples in four micro-batches."""
    halves = Chain().layers[2 * dist.get_rank() : 2 * dist.get_rank() + 2]
    _step(PipelineStage(nn.Sequential(*halves), dist.get_rank(), 2, torch.device("cpu")), 4, torch.randn(10, 8))
    return "runs"


def norm(_: int) -> str:
    """Evaluation of a traced stage: whether running statistics stay as they are."""
    stage = _traced(Norm(), "last", torch.randn(2, 8))
    buffers = {n: b for n, b in stage.submod.named_buffers() if n.endswith("running_mean")}
    if not buffers:
        return "(no batch norm on this stage)"
    try:
        stage.submod.eval()
        said = "eval() is accepted"
    except Exception as error:  # noqa: BLE001
        said = f"eval(): {type(error).__name__}"
    before = next(iter(buffers.values())).clone()
    stage.submod(torch.randn(2, 8))
    changed = not torch.equal(before, next(iter(buffers.values())))
    return f"{said}; a forward then {'changes' if changed else 'keeps'} the running mean"


def _case(case: Callable[[int], str], rank: int) -> str:
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    try:
        return case(rank)
    except Exception as error:  # noqa: BLE001 (what it raises is the result)
        first = error
        while first.__cause__ is not None:
            first = first.__cause__
        return f"{type(first).__name__}: {' '.join(str(first).split())[:200]}"


CASES = ((accumulate, 2), (tied, 2), (skip, 4), (mask, 2), (few, 2), (uneven, 2), (norm, 2))


def main() -> None:
    print(f"torch {torch.__version__}, gloo on this machine\n")
    for case, ranks in CASES:
        print(f"{case.__name__}: {(case.__doc__ or '').strip()}")
        try:
            for rank, said in enumerate(run_processes(functools.partial(_case, case), ranks, timeout_s=LIMIT_S)):
                print(f"    rank {rank}: {said}", flush=True)
        except AutopipeError as error:
            print(f"    {error.got}", flush=True)


if __name__ == "__main__":
    main()
