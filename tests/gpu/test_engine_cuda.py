"""The engine on CUDA: on one device against the plain model, on several over NCCL. Skipped where the devices are not
there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import autopipe
from autopipe.engine.ranks.context import make_context
from autopipe.engine.step.split_backward import Division, input_gradients
from autopipe.engine.transport.p2p import Transport
from scenarios.pipelines import NAMES, Block, make
from tests.gloo.launch import run_ranks
from tests.gloo.plain import plain_step, relative_error
from tests.gloo.test_transport import samples, spec_of

TOLERANCE = 1e-4  # cuBLAS and cuDNN choose other sums for other shapes
one_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
several_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def _to_device(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda v: v.cuda() if isinstance(v, torch.Tensor) else v, value)


def _errors(name: str, schedule: str, stages_a_rank: int) -> list[float]:
    """Relative errors of the loss and of the gradients that this rank holds."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    model, args, kwargs, target, loss_fn = make(name, 12)
    args, kwargs, target = _to_device((args, kwargs, target))
    plain = copy.deepcopy(model).cuda()
    engine = autopipe.pipeline(
        model, loss_fn=loss_fn, num_stages=stages_a_rank * num_ranks, num_microbatches=6, schedule=schedule
    )
    loss = float(engine.train_batch(*args, target=target, **kwargs))
    expected = plain_step(plain, args, kwargs, target, loss_fn, 6)
    gradients = {n: p.grad for n, p in plain.named_parameters()}
    errors = [abs(loss - expected) / abs(expected)]
    for n, p in engine.named_parameters():
        assert p.device.type == "cuda"
        assert (p.grad is None) == (gradients[n] is None)
        if p.grad is not None:
            errors.append(relative_error(p.grad, gradients[n]))
    output = engine.predict(*args, **kwargs)
    assert all(t.device.type == "cuda" for t in torch.utils._pytree.tree_leaves(output) if t is not None)
    engine.close()
    return errors


@one_device
@pytest.mark.parametrize("name", NAMES)
def test_one_device_equals_the_plain_model(name: str) -> None:
    assert max(_errors(name, "1f1b", 1)) <= TOLERANCE


@one_device
def test_a_backward_in_two_parts_equals_one() -> None:
    torch.manual_seed(0)
    block, x = Block(16, 2).cuda(), torch.randn(3, 5, 16, device="cuda", requires_grad=True)
    gradient = torch.randn(3, 5, 16, device="cuda")
    twin, twin_x = copy.deepcopy(block), x.detach().clone().requires_grad_()
    twin(twin_x).backward(gradient)
    input_gradients([block(x)], [gradient], [x], Division()).run()
    assert x.grad is not None and twin_x.grad is not None
    for a, b in zip([x, *block.parameters()], [twin_x, *twin.parameters()], strict=True):
        assert a.grad is not None and b.grad is not None
        assert relative_error(a.grad, b.grad) <= TOLERANCE


@one_device
def test_dropout_follows_the_seed_and_spans_are_of_the_device(tmp_path: Path) -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 64))
        engine = autopipe.pipeline(
            model, loss_fn=torch.nn.functional.mse_loss, seed=5, data_parallel=1, num_microbatches=2
        )
        x = torch.randn(8, 64).cuda()
        state = torch.cuda.get_rng_state()
        losses.append([float(engine.train_batch(x, target=x)) for _ in range(3)])
        assert torch.equal(state, torch.cuda.get_rng_state()), "the user's generator is left as it was"
        engine.trace(tmp_path / "trace.json")
        engine.close()
    assert losses[0] == losses[1]
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e.get("ph") == "X"]
    assert events and all(e["dur"] > 0 for e in events)


def _over_nccl(name: str, schedule: str, stages_a_rank: int) -> list[float]:
    torch.cuda.set_device(int(make_context("cuda").device.index))
    return _errors(name, schedule, stages_a_rank)


@several_devices
@pytest.mark.parametrize(
    ("name", "schedule", "stages_a_rank"),
    [(n, "1f1b", 1) for n in NAMES] + [("gpt", "zb-h1", 1), ("unet", "interleaved", 2), ("gpt", "gpipe", 1)],
)
def test_several_devices_equal_the_plain_model(name: str, schedule: str, stages_a_rank: int) -> None:
    for errors in run_ranks(_over_nccl, min(torch.cuda.device_count(), 4), name, schedule, stages_a_rank):
        assert max(errors) <= TOLERANCE


def _exchange() -> dict[str, bool]:
    context = make_context("cuda")
    transport = Transport(context)
    transport.open([(0, 1), (1, 0)])
    mine, peer, same = context.rank, 1 - context.rank, {}
    for name, tensor in samples().items():
        if mine == 0:  # one order of both transfers on both ranks
            there = transport.send((mine, peer), [tensor.to(context.device)], spec_of(tensor))
            here = transport.recv((peer, mine), spec_of(tensor))
        else:
            here = transport.recv((peer, mine), spec_of(tensor))
            there = transport.send((mine, peer), [tensor.to(context.device)], spec_of(tensor))
        (arrived,) = here.join()
        there.join()
        same[name] = (
            torch.equal(arrived.cpu().double(), tensor.double())
            if not tensor.is_complex()
            else torch.equal(arrived.cpu(), tensor)
        )
    transport.close()
    dist.destroy_process_group()
    return same


@several_devices
def test_every_kind_of_tensor_arrives_over_nccl() -> None:
    for same in run_ranks(_exchange, 2, fresh=True):
        assert all(same.values()), same


def _peak_bytes(num_microbatches: int) -> int:
    """The most that this rank allocates in a step beyond what is there before it, 4 MB an activation."""
    torch.cuda.set_device(int(make_context("cuda").device.index))
    num_stages = dist.get_world_size()
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU()) for _ in range(4)))
    x = torch.randn(4096 * num_microbatches, 256).cuda()
    engine = autopipe.pipeline(
        model,
        loss_fn=torch.nn.functional.mse_loss,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        schedule="1f1b",
    )
    engine.train_batch(x, target=x)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine.train_batch(x, target=x)
    peak = torch.cuda.max_memory_allocated() - before
    engine.close()
    return peak


@several_devices
def test_buffers_do_not_grow_with_the_number_of_microbatches() -> None:
    few, many = (
        run_ranks(_peak_bytes, min(torch.cuda.device_count(), 4), count, measured=True, fresh=True) for count in (8, 64)
    )
    for a, b in zip(few, many, strict=True):
        assert b <= 1.1 * a + 2**20
