# python benchmarks/comparison_deepspeed.py [CASE…]
"""What DeepSpeed's pipeline engine does with the cases of `docs/comparison.md`: each is run on two gloo processes and
printed.

Needs `pip install deepspeed`. Each case has a time limit; a case that hangs is printed as such. The table in the
document quotes this output.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from autopipe.errors import AutopipeError
from autopipe.verify.processes import run_processes

LIMIT_S = 90.0
MICROBATCHES, SIZE = 4, 2


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def engine_of(layers: list[Any], **settings: Any) -> Any:
    """DeepSpeed's engine over two stages of as many layers each."""
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        from deepspeed.pipe import PipelineModule

        logging.disable(logging.WARNING)
        deepspeed.init_distributed(dist_backend="gloo")
        optimizer = settings.pop("optimizer", torch.optim.SGD)
        net = PipelineModule(layers=layers, num_stages=2, loss_fn=loss_fn, partition_method="uniform")
        config = {
            "train_batch_size": MICROBATCHES * SIZE,
            "train_micro_batch_size_per_gpu": SIZE,
            "gradient_accumulation_steps": MICROBATCHES,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            **settings,
        }
        parameters = [p for p in net.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=net, config=config, optimizer=optimizer(parameters, lr=0.1), model_parameters=parameters
        )
    return engine


def batches(*sizes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of these sizes, for ever, equal on all ranks."""
    generator = torch.Generator().manual_seed(1)
    while True:
        for size in sizes:
            x = torch.randn(size, 8, generator=generator)
            yield x, x


def chain(num_layers: int = 4) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(num_layers)]


def tied(rank: int) -> str:
    """A parameter that two plain layers of different stages share, after three steps: it should be one value."""
    layers = [nn.Linear(8, 8, bias=False) for _ in range(4)]
    layers[3].weight = layers[0].weight
    engine = engine_of(layers)
    data = batches(SIZE)
    for _ in range(3):
        engine.train_batch(data)
    seen: list[Any] = [None, None]
    dist.all_gather_object(seen, layers[0 if rank == 0 else 3].weight.detach())
    return f"the two stages' values are {float((seen[0] - seen[1]).norm() / seen[0].norm()):.3f} (relative) apart"


def clipping(rank: int) -> str:
    """The norm of what one step of SGD moved all parameters by, over lr × gradient_clipping: 1 is right."""
    layers = chain()
    engine = engine_of(layers, gradient_clipping=1e-3)
    own = layers[2 * rank : 2 * rank + 2]
    before = [p.detach().clone() for layer in own for p in layer.parameters()]
    engine.train_batch(batches(SIZE))
    after = [p.detach() for layer in own for p in layer.parameters()]
    moved = sum((a - b).square().sum() for a, b in zip(after, before, strict=True))
    assert isinstance(moved, Tensor)
    dist.all_reduce(moved)
    return f"{float(moved.sqrt()) / (0.1 * 1e-3):.3f}"


def frozen(_: int) -> str:
    """A first stage whose parameters are all frozen."""
    layers = chain()
    for layer in layers[:2]:
        layer.requires_grad_(False)
    return _trains(layers)


def uneven(_: int) -> str:
    """A last micro-batch with one sample less."""
    return _trains(chain(), 2, 2, 2, 1)


class Wrapped(nn.Module):
    """Returns or takes a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        return {"x": self.linear(x)} if isinstance(x, Tensor) else self.linear(x["x"])


def structure(_: int) -> str:
    """A dict that crosses from the first stage to the second."""
    return _trains([chain()[0], Wrapped(), Wrapped(), chain()[0]])


class Adds(nn.Module):
    """Takes a tuple with an integer tensor in it, and passes that on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, given: Any) -> Any:
        x, ids = given if isinstance(given, tuple) else (given, torch.arange(8))
        return self.linear(x + ids), ids


class Last(nn.Module):
    """The tensor of a tuple."""

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        return given[0]


def integers(_: int) -> str:
    """An integer tensor that crosses beside the activation."""
    return _trains([Adds(), Adds(), Adds(), Last()])


def precision(_: int) -> str:
    """The dtype of the loss under bf16."""
    engine = engine_of(chain(), bf16={"enabled": True})
    data = ((x.bfloat16(), y.bfloat16()) for x, y in batches(SIZE))
    return f"{engine.train_batch(data).dtype}"


def evaluation(_: int) -> str:
    """The logits of eval_batch for a batch of 8 samples in 4 micro-batches."""
    engine = engine_of(chain())
    engine.train_batch(batches(SIZE))
    _loss, logits = engine.eval_batch(batches(SIZE), return_logits=True)
    return "None" if logits is None else f"a tensor of {tuple(logits.shape)}"


def data_ends(_: int) -> str:
    """An iterator that ends in the middle of a batch, on the first rank alone."""
    engine = engine_of(chain())
    source = batches(SIZE)
    if dist.get_rank() == 0:
        source = iter([next(source), next(source)])
    return f"loss {float(engine.train_batch(source)):.3f}"


def profile_method(_: int) -> str:
    """partition_method="profile"."""
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        from deepspeed.pipe import PipelineModule

        deepspeed.init_distributed(dist_backend="gloo")
        PipelineModule(layers=chain(), num_stages=2, loss_fn=loss_fn, partition_method="profile")
    return "runs"


def _trains(layers: list[Any], *sizes: int) -> str:
    engine = engine_of(layers)
    return f"trains, loss {float(engine.train_batch(batches(*(sizes or (SIZE,))))):.3f}"


def _case(case: Callable[[int], str], rank: int) -> str:
    torch.manual_seed(0)
    try:
        return case(rank)
    except BaseException as error:  # noqa: BLE001 (what it raises is the result)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


ONLY = sys.argv[1:]
CASES = (tied, clipping, frozen, uneven, structure, integers, precision, evaluation, data_ends, profile_method)


def main() -> None:
    import deepspeed

    print(f"DeepSpeed {deepspeed.__version__}, torch {torch.__version__}, gloo on this machine\n")
    for case in [c for c in CASES if not ONLY or c.__name__ in ONLY]:
        print(f"{case.__name__}: {(case.__doc__ or '').strip()}")
        try:
            for rank, said in enumerate(run_processes(functools.partial(_case, case), 2, timeout_s=LIMIT_S)):
                print(f"    rank {rank}: {said}", flush=True)
        except AutopipeError as error:
            print(f"    {error.got}", flush=True)


if __name__ == "__main__":
    main()
