"""Stages run one after another in one process give what the model gives: outputs, gradients, names."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.capture import Captured
from autopipe.errors import PlanError
from autopipe.placement import follow, owners
from autopipe.stages import MODEL_INPUT, StageModule, StageSpec, cut, edges_of, stage_module
from scenarios.pipelines import NAMES, make
from tests.single.test_capture import Autocast, Checkpointed


def random_cuts(captured: Captured, num_stages: int, seed: int) -> tuple[dict[str, int], int]:
    """A placement in program order whose cuts fall into no group."""
    nodes, spans = captured.nodes, dict[str, list[int]]()
    for i, node in enumerate(nodes):
        if node.meta.get("group"):
            spans.setdefault(node.meta["group"], []).append(i)
    inside = {j for places in spans.values() for j in range(places[0] + 1, places[-1] + 1)}
    free = [i for i in range(1, len(nodes)) if i not in inside]
    cuts = sorted(random.Random(seed).sample(free, min(num_stages - 1, len(free))))
    return {n.name: sum(i >= c for c in cuts) for i, n in enumerate(nodes)}, len(cuts) + 1


def run_stages(specs: tuple[StageSpec, ...], modules: list[StageModule], tensors: list[Tensor]) -> list[Tensor]:
    values: dict[str, Tensor] = {}
    results: dict[int, Tensor] = {}
    for spec, module in zip(specs, modules, strict=True):
        inputs = [tensors[i.position] if i.source == MODEL_INPUT else values[i.name] for i in spec.inputs]
        out = module(*inputs)
        values |= {o.name: v for o, v in zip(spec.outputs, out, strict=False)}
        results |= dict(zip(spec.results, out[len(spec.outputs) :], strict=True))
    return [results[i] for i in range(len(results))]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_stages_compute_what_the_model_computes(name: str, num_stages: int) -> None:
    model, args, kwargs, target, loss_fn = make(name, 3)
    plain = copy.deepcopy(model)
    captured = autopipe.capture(model, args, kwargs, loss_fn=loss_fn, target=target).loss_only()
    stage_of, count = random_cuts(captured, num_stages, seed=num_stages)
    specs = cut(captured, stage_of, count)
    modules = [stage_module(captured, s) for s in specs]
    tensors: Any = torch.utils._pytree.tree_leaves((args, kwargs) if loss_fn is None else (args, kwargs, target))
    got = gradients(model, run_stages(specs, modules, [t for t in tensors if isinstance(t, Tensor)])[0])
    output = plain(*args, **kwargs)
    expected = gradients(plain, output["loss"] if loss_fn is None else loss_fn(output, target))
    for n, g in expected.items():
        assert (g is None) == (got[n] is None), n
        assert g is None or torch.allclose(g, got[n], rtol=1e-5, atol=1e-7), n
    keys = set().union(*(m.state_dict().keys() for m in modules))
    assert keys <= set(plain.state_dict())
    assert all(e.source < e.target for e in edges_of(specs))


def test_a_checkpoint_region_is_computed_again_in_the_backward() -> None:
    model = Checkpointed(False)
    x = torch.randn(3, 4)
    captured = autopipe.capture(model, (x,))
    (spec,) = cut(captured, {n.name: 0 for n in captured.nodes}, 1)
    stage, calls = stage_module(captured, spec), []
    model.drop.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    (out,) = stage(x)
    assert len(calls) == 1
    got = gradients(model, out.sum())
    assert len(calls) == 2
    model.drop._forward_pre_hooks.clear()
    torch.manual_seed(3)
    expected = gradients(copy.deepcopy(model), model(x).sum())
    expected = {n: p.grad for n, p in model.named_parameters()}
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    assert sorted(stage.state_dict()) == sorted(model.state_dict())


def test_modes_are_written_back_into_every_stage() -> None:
    model, x = Autocast(), torch.randn(3, 4)
    captured = autopipe.capture(model, (x,))
    names = [n.name for n in captured.nodes]
    specs = cut(captured, {n: min(i, 2) for i, n in enumerate(names)}, 3)
    (out,) = run_stages(specs, [stage_module(captured, s) for s in specs], [x])
    assert torch.equal(out, model(x))


def test_another_graph_of_the_model_follows_the_placed_parameters() -> None:
    model, args, _, target, loss_fn = make("unet", 4)
    captured = autopipe.capture(model, args, loss_fn=loss_fn, target=target).loss_only()
    stage_of, _ = random_cuts(captured, 4, seed=0)
    owned = owners(captured, stage_of)
    other = autopipe.capture(model.eval(), (args[0][:2],))
    placed = follow(other, owned)
    for name, stages in owners(other, placed).items():
        assert set(stages) <= set(owned[name])
    cut(other, placed, 4)


def test_a_plan_of_another_model_is_refused() -> None:
    plans = []
    for width in (1, 2):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2 * width)))
        captured = autopipe.capture(model, (torch.randn(2, 4),))
        import profiler

        plans.append(
            (captured, autopipe.partition(profiler.profile(captured.graph_module, [torch.randn(2, 4)]), num_stages=2))
        )
    assert autopipe.build_stage(*plans[0], 1).spec.index == 1
    with pytest.raises(PlanError, match="plan this model"):
        autopipe.build_stage(plans[0][0], plans[1][1], 0)
    with pytest.raises(PlanError, match="stage 2"):
        autopipe.build_stage(*plans[0], 2)
