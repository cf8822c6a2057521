"""A model and a call go in; whether the captured graph, whole and cut into stages, computes what the model computes
comes out.

Independent of capture's own self-check: the model's state is kept and put back here, the comparison is written anew,
and stages are run as the engine runs them: tensors that cross are detached, gradients go back stage by stage.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autopipe
from autopipe.capture import Captured
from autopipe.capture.checkpointing import with_checkpoints
from autopipe.capture.selfcheck import self_check
from autopipe.capture.trace import Call, flatten_output
from autopipe.stages import MODEL_INPUT, StageModule, StageSpec, cut, stage_module

Observed = dict[str, Any]
SLOW_S = 8  # of processor time; ten of these steps and their comparisons fit into the time limit of a loaded machine


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Buffers, gradients and plain attributes as they were."""
    values = [
        (m, dict(m.__dict__), dict(m._buffers), dict(m._parameters))
        for m in model.modules()
        if not isinstance(m, torch.jit.ScriptModule)
    ]
    copies = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        for module, attributes, buffers, parameters in values:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            module._parameters.update(parameters)
        with torch.no_grad():
            for buffer, value in copies:
                buffer.copy_(value)
        for p in model.parameters():
            p.grad = None


def _objective(outputs: list[Tensor], loss: int | None) -> Tensor | None:
    """The loss, or a weighted sum of all outputs that depend on parameters."""
    if loss is not None:
        return outputs[loss]
    total: Any = None
    for out in outputs:
        if out.requires_grad and out.is_floating_point() | out.is_complex():
            dense = out.to_dense() if out.layout is not torch.strided else out
            real = torch.view_as_real(dense).double() if dense.is_complex() else dense.double()
            term = (real * torch.linspace(0.5, 1.5, real.numel(), dtype=torch.float64).view(real.shape)).sum()
            total = term if total is None else total + term
    return total


def observe(model: nn.Module, run: Callable[[], list[Tensor]], loss: int | None, seed: int = 7) -> Observed:
    """Outputs, gradients and buffers of one run from a fixed seed."""
    with _put_back(model):
        _seed(seed)
        outputs = run()
        seen: Observed = {f"output {i}": o.detach().clone() for i, o in enumerate(outputs)}
        objective = _objective(outputs, loss)
        if objective is not None and objective.requires_grad:
            objective.backward()
        return seen | _state(model)


def _seed(seed: int = 7) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _state(model: nn.Module) -> Observed:
    found: Observed = {
        f"gradient of {n}": None if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters()
    }
    return found | {f"buffer {n}": b.detach().clone() for n, b in model.named_buffers()}


def difference(got: Observed, expected: Observed) -> str:
    """The first value that differs, in words; empty where none does."""
    scale = max(
        (
            float(v.abs().nan_to_num().max())
            for n, v in expected.items()
            if n.startswith("gradient") and v is not None and v.numel()
        ),
        default=0.0,
    )
    for name, value in expected.items():
        other = got.get(name)
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            if value is not other:
                found, due = ("none" if v is None else "a tensor" for v in (other, value))
                return f"{name}: {found} instead of {due}"
            continue
        if value.shape != other.shape or value.dtype != other.dtype:
            return f"{name}: {tuple(other.shape)} {other.dtype} instead of {tuple(value.shape)} {value.dtype}"
        if value.layout is not torch.strided:
            value, other = value.to_dense(), other.to_dense()
        if not (value.is_floating_point() or value.is_complex()):
            if not torch.equal(value, other):
                return f"{name}: other values"
            continue
        tolerance = 3e-2 if value.dtype in (torch.bfloat16, torch.float16) else 2e-4
        floor = 1e-5 * scale if name.startswith("gradient") else 1e-6
        if not torch.allclose(other, value, rtol=tolerance, atol=floor + tolerance * _size(value), equal_nan=True):
            return f"{name}: differs by up to {float((other - value).abs().nan_to_num().max()):.1e}"
    return ""


def _size(value: Tensor) -> float:
    finite = value[torch.isfinite(value)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def random_cuts(captured: Captured, num_stages: int) -> tuple[dict[str, int], int]:
    """A placement in program order whose cuts fall into no group."""
    nodes, spans = captured.nodes, dict[str, list[int]]()
    for i, node in enumerate(nodes):
        if node.meta.get("group"):
            spans.setdefault(node.meta["group"], []).append(i)
    inside = {j for places in spans.values() for j in range(places[0] + 1, places[-1] + 1)}
    free = [i for i in range(1, len(nodes)) if i not in inside]
    cuts = sorted(random.Random(num_stages).sample(free, min(num_stages - 1, len(free))))
    return {n.name: sum(i >= c for c in cuts) for i, n in enumerate(nodes)}, len(cuts) + 1


class _Staged:
    """Stages run one after another, each differentiated on its own as on ranks of their own."""

    def __init__(self, specs: tuple[StageSpec, ...], modules: list[StageModule], tensors: list[Tensor]) -> None:
        self.specs, self.values = specs, dict[str, Tensor]()
        self.received: list[dict[str, Tensor]] = []
        self.results: dict[int, Tensor] = {}
        for spec, module in zip(specs, modules, strict=True):
            own: dict[str, Tensor] = {}
            for i in spec.inputs:
                value = tensors[i.position] if i.source == MODEL_INPUT else self.values[i.name].detach()
                own[i.name] = value.requires_grad_(True) if i.gradient else value
            self.received.append(own)
            out = module(*own.values())
            self.values |= {o.name: v for o, v in zip(spec.outputs, out, strict=False)}
            self.results |= dict(zip(spec.results, out[len(spec.outputs) :], strict=True))

    def backward(self, loss: int | None) -> None:
        outputs = [self.results[i] for i in range(len(self.results))]
        objective = _objective(outputs, loss)
        pending: dict[str, Tensor] = {}
        for spec, own in zip(reversed(self.specs), reversed(self.received), strict=True):
            roots: list[tuple[Tensor, Tensor | None]] = (
                [(objective, None)]
                if objective is not None and spec is self.specs[-1] and objective.requires_grad
                else []
            )
            roots += [
                (self.values[o.name], pending[o.name])
                for o in spec.outputs
                if o.gradient and o.name in pending and self.values[o.name].requires_grad
            ]
            if roots:
                torch.autograd.backward([r for r, _ in roots], [g for _, g in roots])
            for i in spec.inputs:
                gradient = own[i.name].grad
                if i.gradient and gradient is not None:
                    pending[i.name] = pending[i.name] + gradient if i.name in pending else gradient


def observe_stages(
    model: nn.Module, captured: Captured, num_stages: int, tensors: list[Tensor]
) -> tuple[Observed, int]:
    """What `observe` gives, from the stages of a random cut."""
    stage_of, count = random_cuts(captured, num_stages)
    if captured.loss is not None:
        last: Any = captured.graph_module.graph.output_node().args[0][captured.loss]
        stage_of[last.name] = max(stage_of.values())
    specs = cut(captured, stage_of, count)
    modules = [stage_module(captured, s) for s in specs]
    for module in modules:
        module.train(model.training)
    with _put_back(model):
        _seed()
        staged = _Staged(specs, modules, [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors])
        seen: Observed = {f"output {i}": v.detach().clone() for i, v in sorted(staged.results.items())}
        staged.backward(captured.loss)
        return seen | _state(model), count


def plain(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    leaves, _ = flatten_output(model(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _differences(
    model: nn.Module, captured: Captured, args: Any, kwargs: Any, loss: int | None, expected: Observed
) -> Iterator[tuple[str, str]]:
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    whole = observe(
        model,
        lambda: with_checkpoints(captured.graph_module)(
            *[t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
        ),
        loss,
    )
    yield "whole", difference(whole, expected)
    if not model.training:
        return
    if loss is not None:
        captured = captured.loss_only()
        expected = {
            ("output 0" if n == f"output {loss}" else n): v
            for n, v in expected.items()
            if not n.startswith("output") or n == f"output {loss}"
        }
    done = set[int]()
    for num_stages in (2, 4):
        got, count = observe_stages(model, captured, num_stages, tensors)
        if count not in done:
            yield f"{count} stages", difference(got, expected)
        done.add(count)


def other_batch(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A batch of the same shapes and other values: rows in reverse, whole numbers shifted along the last dimension,
    others scaled."""

    def other(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0:
            return t
        t = t.detach().flip(0)
        return t * 0.9 if t.is_floating_point() or t.is_complex() else t.roll(1, -1) if t.dim() > 1 else t

    changed: tuple[Any, Any] = pytree.tree_map(other, (args, kwargs))
    return changed


def _on_another_batch(model: nn.Module, captured: Captured, args: Any, kwargs: Any) -> str:
    """`equal`, `not run` where the plain model does not take the batch, `raises` where a guard says that it is another,
    or what differs."""
    args, kwargs = other_batch(args, kwargs)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    try:
        expected = observe(model, lambda: plain(model, args, kwargs), None)
    except Exception:  # noqa: BLE001 (a batch that the model does not take shows nothing)
        return "not run"
    try:
        got = observe(model, lambda: with_checkpoints(captured.graph_module)(*tensors), None)
    except RuntimeError as cause:
        if "the model was captured while" in str(cause):
            return "raises"
        raise
    return difference(got, expected) or "equal"


def check(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The verdict on one model: `right`, `refused`, `wrong` or `skipped`, and why."""
    answer: dict[str, Any] = {"outcome": "right", "parameters": sum(p.numel() for p in model.parameters())}
    for training in (True, False):
        mode = "train" if training else "eval"
        model.train(training)
        begun = time.process_time()
        try:
            first, second = (observe(model, lambda: plain(model, args, kwargs), None) for _ in range(2))
        except Exception as cause:  # noqa: BLE001 (a model that does not run by itself is no case)
            if training:
                return answer | {"outcome": "skipped", "why": f"the plain model fails in {mode} mode: {_short(cause)}"}
            return answer | {"note": f"not run in eval mode: {_short(cause)}"}
        if training and time.process_time() - begun > 2 * SLOW_S:
            return answer | {"outcome": "skipped", "why": f"a step of the plain model takes more than {SLOW_S} s here"}
        if noise := difference(second, first):
            return answer | {
                "outcome": "skipped",
                "why": f"the plain model differs from itself under one seed: {noise}",
            }
        call = Call(args=args, kwargs=kwargs)
        start = time.perf_counter()
        try:
            with _put_back(model):
                captured = autopipe.capture(model, args, kwargs, check=False)
                answer[f"capture_s_{mode}"] = round(time.perf_counter() - start, 3)
                try:
                    self_check(model, captured, call)
                except autopipe.CaptureError:  # as a user's call does, which passes this way over for the next
                    captured = autopipe.capture(model, args, kwargs)
        except autopipe.errors.AutopipeError as cause:
            return answer | {"outcome": "refused", "why": f"{mode}: {_short(cause, 500)}"}
        answer |= {
            f"route_{mode}": captured.route,
            f"nodes_{mode}": len(captured.nodes),
            f"opaque_{mode}": dict(captured.opaque),
        }
        expected = first if captured.loss is None else observe(model, lambda: plain(model, args, kwargs), captured.loss)
        for what, wrong in _differences(model, captured, args, kwargs, captured.loss, expected):
            if wrong:
                return answer | {"outcome": "wrong", "why": f"{mode}, {what}: {wrong}"}
        other = answer[f"other_{mode}"] = _on_another_batch(model, captured, args, kwargs)
        if other not in ("equal", "not run", "raises"):
            return answer | {"outcome": "wrong", "why": f"{mode}, another batch: {other}"}
    return answer


def _short(cause: BaseException, limit: int = 250) -> str:
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:limit]
