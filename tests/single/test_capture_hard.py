"""Hard cases: each is captured, whole and in stages, with the plain model's outputs, gradients and buffers; or refused
in words."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError
from autopipe.stages import cut, stage_module
from scenarios.comparison import check
from scenarios.hard_cases import CASES, WIDTH, Detector, Experts, Net, OneStageDetector, ReadsValue, Speech

REFUSED = {
    "layer drop drawn by Python": "random numbers drawn by Python",
    "layer drop drawn by torch, read by Python": r"__bool__\(\)",
    "noise drawn by numpy": "random numbers drawn by Python",
    "numpy inside forward, without gradient": "numpy",
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_hard_case_is_right_or_refused_in_words(name: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about old weight_norm, scripts and the like
        model, args, kwargs = CASES[name]()
        answer = check(model, args, kwargs)
    if name in REFUSED:
        assert answer["outcome"] == "refused"
        for part in ("module", "/hard_cases/", "remedy"):
            assert part in answer["why"]
    else:
        assert answer["outcome"] == "right", answer


def net(function: Any, *modules: tuple[str, nn.Module]) -> Net:
    def add(model: nn.Module) -> None:
        for name, module in modules:
            model.add_module(name, module)

    return Net(function, add)


def test_the_report_names_route_modules_and_guards() -> None:
    model = net(lambda n, h: n.experts(h), ("experts", Experts()))
    text = autopipe.capture(model, (torch.randn(4, WIDTH),)).report()
    assert "captured by: opaque" in text
    assert "kept whole: experts (" in text
    model = Net(lambda n, h, mask: h * 2 if mask.all() else h)
    captured = autopipe.capture(model, (torch.randn(4, WIDTH), torch.ones(4, dtype=torch.bool)))
    assert "checked at each run: Tensor.__bool__() gives True" in captured.report()
    assert "test_capture_hard.py:" in captured.report()


class DrawsInPython(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        import random

        return x * 2 if random.random() < 0.5 else x


def test_a_module_that_draws_in_python_is_kept_whole() -> None:
    model = net(lambda n, h: n.draws(h), ("draws", DrawsInPython()))
    captured = autopipe.capture(model, (torch.randn(4, WIDTH),))
    assert set(captured.opaque) == {"draws"}
    assert len({captured(torch.ones(4, WIDTH)).sum().item() for _ in range(20)}) == 2


def test_the_random_state_during_capture_is_always_the_same_and_afterwards_as_before() -> None:
    seen: list[int] = []

    def look(n: Net, h: Tensor) -> Tensor:
        seen.append(torch.default_generator.initial_seed())
        return h

    model = Net(look)
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        autopipe.capture(model, (torch.ones(4, WIDTH),), check=False)
        assert torch.equal(torch.get_rng_state(), before)
    assert len(set(seen)) == 1


def test_a_transform_over_tensors_from_around_it_is_no_constant() -> None:
    def slope(n: Net, h: Tensor) -> Tensor:
        scale = h.detach().mean(0)
        return h + torch.func.grad(lambda t: (t.sin() * scale).sum())(h)

    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(CaptureError, match=r"code under torch\.vmap or torch\.func"):
            autopipe.capture(Net(slope), (torch.randn(4, WIDTH),))


def test_nothing_of_the_recording_stays_in_the_model() -> None:
    model = net(lambda n, h: n.alias(h) + n.kept["k"], ("other", nn.Linear(WIDTH, WIDTH)))
    model.alias, model.kept, seen = model.first, {"k": torch.ones(WIDTH)}, []  # type: ignore[assignment]
    model.other.register_forward_hook(lambda m, a, out: seen.append(out))  # type: ignore[union-attr]
    model.function = (lambda n, h: n.kept.setdefault("new", n.other(h)) + n.alias(h),)
    before = dict(model.named_parameters())
    autopipe.capture(model, (torch.randn(4, WIDTH),), check=False)
    assert set(model.kept) == {"k"}  # type: ignore[arg-type]
    assert not seen
    assert all(p is before[n] for n, p in model.named_parameters())


def test_numbers_that_a_module_reads_from_tensors_are_not_frozen() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, int((x > 0).sum())

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counts, self.linear = Counts(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y, number = self.counts(x)
            return self.linear(y) * number

    model = net(lambda n, h: n.uses(h), ("uses", Uses()))
    captured = autopipe.capture(model, (torch.randn(4, WIDTH),))
    assert set(captured.opaque) == {"uses"}
    other = torch.randn(4, WIDTH)
    assert torch.equal(captured(other), model(other))


def test_a_value_of_the_inputs_is_guarded_and_the_rest_still_cut() -> None:
    model = net(lambda n, h, mask: n.reads(h) if mask.all() else h, ("reads", ReadsValue()))
    x, mask = torch.randn(4, WIDTH), torch.ones(4, dtype=torch.bool)
    captured = autopipe.capture(model, (x, mask))
    assert set(captured.opaque) == {"reads"}
    with pytest.raises(RuntimeError, match="gave True, and now it gives False"):
        captured(x, ~mask)


def test_a_backward_hook_on_the_whole_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_full_backward_hook(lambda m, gi, go: None)
    with pytest.raises(CaptureError, match="put it on a submodule"):
        autopipe.capture(model, (torch.randn(3, 2),))


def _follows_other_values(model: nn.Module, kept: set[str]) -> None:
    x = torch.randn(4, WIDTH)
    captured = autopipe.capture(model, (x,))
    assert set(captured.opaque) == kept
    for _ in range(4):
        other = torch.randn(4, WIDTH)
        got, expected = captured(other), model(other)
        assert got.keys() == expected.keys()
        for name in expected:
            assert torch.equal(got[name], expected[name])


def test_a_detector_is_right_for_other_numbers_of_proposals() -> None:
    _follows_other_values(Detector(), {"scales", "proposals", "heads"})


def test_a_method_that_picks_rows_by_value_is_kept_whole() -> None:
    _follows_other_values(OneStageDetector(), {"scales", ":compute_loss"})


def test_tensors_of_unknown_shape_do_not_cross_and_the_rest_can_be_cut() -> None:
    captured = autopipe.capture(Detector(), (torch.randn(4, WIDTH),))
    groups = {str(n.target): n.meta.get("group") for n in captured.nodes}
    assert groups["proposals"] is not None
    assert groups["proposals"] == groups["heads"]
    assert groups["trunk.1"] is None


def test_a_method_of_a_large_module_is_kept_whole_and_labels_may_have_other_lengths() -> None:
    model, x = Speech(), torch.randn(4, WIDTH)
    captured = autopipe.capture(model, (x, torch.tensor([[1, 2, -1], [3, -1, -1]])))
    assert set(captured.opaque) == {"encoder:mask"}
    assert len(captured.guards) == 1  # that all labels are in the vocabulary
    longer = torch.tensor([[1, 2, 3], [3, 1, -1]])
    for mode in (model.eval, model.train):
        mode()
        captured = autopipe.capture(model, (x, torch.tensor([[1, 2, -1], [3, -1, -1]])))
        np.random.seed(0)
        expected = model(x, longer)
        np.random.seed(0)
        got = captured(x, longer)
        assert torch.equal(got["loss"], expected["loss"])
    with pytest.raises(RuntimeError, match="gave False, and now it gives True"):
        captured(x, longer + 3)


def test_a_stage_gives_a_method_kept_whole_the_parameters_of_its_own() -> None:
    model = Speech()
    captured = autopipe.capture(model, (torch.randn(4, WIDTH), torch.tensor([[1, 2, -1], [3, -1, -1]])))
    last = max(i for i, n in enumerate(captured.nodes) if "encoder" in str(n.target))
    stage_of = {n.name: int(i > last) for i, n in enumerate(captured.nodes)}
    first = cut(captured, stage_of, 2)[0]
    assert "encoder.masked" in dict(stage_module(captured, first).named_parameters())
