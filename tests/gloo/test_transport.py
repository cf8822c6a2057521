"""Tensors of every kind arrive as they were sent, matched by order alone, over a channel or a group for each
direction."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from autopipe.engine.ranks.context import make_context
from autopipe.engine.transport.p2p import MessageSpec, TensorSpec, Transport
from tests.gloo.launch import run_ranks


def spec_of(*tensors: Tensor) -> MessageSpec:
    return MessageSpec([TensorSpec(shape=tuple(t.shape), dtype=t.dtype, stride=t.stride()) for t in tensors])


def samples() -> dict[str, Tensor]:
    """One of each kind, the same on every rank."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=g)
    return {
        "float32": x,
        "float64": x.double(),
        "bfloat16": x.bfloat16(),
        "float16": x.half(),
        "int64": (100 * x).long(),
        "uint8": (100 * x.abs()).byte(),
        "bool": x > 0,
        "complex64": torch.complex(x, -x),
        "conjugated": torch.complex(x, -x).conj(),
        "float8": x.to(torch.float8_e4m3fn),
        "scalar": torch.tensor(7.5),
        "empty": torch.zeros(0, 4),
        "empty inside": torch.zeros(3, 0, 2, dtype=torch.int32),
        "transposed": x.transpose(0, 2),
        "channels last": torch.randn(2, 3, 4, 5, generator=g).to(memory_format=torch.channels_last),
        "slice": x[:, ::2],
        "expanded": x[:1].expand(3, 4, 5),
        "requires grad": x.clone().requires_grad_(),
    }


def _exchange(shared_memory: str) -> dict[str, Any]:
    os.environ["AUTOPIPE_SHARED_MEMORY"] = shared_memory
    context = make_context("cpu")
    transport = Transport(context)
    transport.open([(0, 1), (1, 0)])
    mine, peer = context.rank, 1 - context.rank
    found: dict[str, Any] = {}
    for name, tensor in samples().items():
        handle = transport.send((mine, peer), [tensor], spec_of(tensor))
        (arrived,) = transport.recv((peer, mine), spec_of(tensor)).join()
        handle.join()
        same = torch.equal(arrived.view(torch.uint8) if "float8" in name else arrived, _plain(tensor, name))
        found[name] = (same, arrived.dtype == tensor.dtype, arrived.stride(), arrived.requires_grad)
    together = list(samples().values())
    handle = transport.send((mine, peer), together, spec_of(*together))
    arrived_together = transport.recv((peer, mine), spec_of(*together)).join()
    handle.join()
    found["together"] = all(
        torch.equal(_plain(a, n), _plain(t, n)) for a, (n, t) in zip(arrived_together, samples().items(), strict=True)
    )
    transport.close()
    dist.destroy_process_group()
    return found


def _plain(tensor: Tensor, name: str) -> Tensor:
    tensor = tensor.detach()
    return tensor.contiguous().view(torch.uint8) if "float8" in name else tensor


@pytest.mark.parametrize("shared_memory", ["1", "0"])
def test_every_kind_of_tensor_arrives_as_it_was_sent(shared_memory: str) -> None:
    for found in run_ranks(_exchange, 2, shared_memory):
        assert found.pop("together")
        for name, (same, same_dtype, stride, requires_grad) in found.items():
            assert same and same_dtype and not requires_grad, name
            tensor = samples()[name]
            if name in ("transposed", "channels last"):
                assert stride == tensor.stride(), "a dense tensor lies in memory as it did"


def _in_order(shared_memory: str, num_messages: int) -> bool:
    """Both directions at once, with delays: no tag tells messages apart, only their order does."""
    os.environ["AUTOPIPE_SHARED_MEMORY"] = shared_memory
    context = make_context("cpu")
    transport = Transport(context)
    transport.open([(1, 0)])
    transport.open([(0, 1), (1, 0)])  # what is open stays
    mine, peer = context.rank, 1 - context.rank
    delays = random.Random(mine)
    spec, right = spec_of(torch.zeros(1000, dtype=torch.int64)), True
    handles: list[Any] = []
    receives = [transport.recv((peer, mine), spec)]
    for i in range(num_messages):
        time.sleep(delays.choice([0.0, 0.0, 0.003]))
        handles.append(transport.send((mine, peer), [torch.full((1000,), 100 * mine + i)], spec))
        if i + 1 < num_messages:
            receives.append(transport.recv((peer, mine), spec))  # one ahead of the one that is needed
        (arrived,) = receives[i].join()
        right = right and bool((arrived == 100 * peer + i).all())
    for handle in handles:
        handle.join()
    done = all(handle.done() and not handle.held for handle in handles)
    transport.close()
    dist.destroy_process_group()
    return right and done


@pytest.mark.parametrize("shared_memory", ["1", "0"])
def test_order_is_the_only_matching(shared_memory: str) -> None:
    assert run_ranks(_in_order, 2, shared_memory, 30) == [True, True]
