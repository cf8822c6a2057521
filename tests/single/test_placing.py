"""What a rank keeps of a model: of other ranks' parameters nothing, wherever modules hold them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import autopipe
from autopipe.engine.setup.place_parameters import place, release


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.LSTM(4, 4, 2)
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.lstm(self.first(x))[0])


@pytest.mark.parametrize("kept", ["last", "lstm", "first"])
def test_parameters_of_others_are_gone_and_the_model_is_still_captured(kept: str) -> None:
    model, x = Recurrent(), torch.randn(3, 2, 4)
    captured = autopipe.capture(model, (x,))
    references = {n: weakref.ref(p) for n, p in model.named_parameters()}
    mine = [n for n in references if n.startswith(kept)]
    before = {n: references[n]() for n in mine}
    release(model, captured, mine)
    gc.collect()
    assert {n for n, p in references.items() if p() is not None} == set(mine)
    assert all(p is before[n] for n, p in model.named_parameters() if n in mine)
    again = autopipe.capture(model, (x[:, :1],))
    assert [n.op for n in again.nodes] == [n.op for n in captured.nodes]


def test_what_another_rank_has_is_not_made_anew_without_a_word() -> None:
    model, x = Recurrent(), torch.randn(3, 2, 4)
    release(model, autopipe.capture(model, (x,)), [n for n, _ in model.named_parameters() if n.startswith("last")])
    options = {"later": False, "seed": 0, "device": torch.device("cpu"), "exact": {}}
    with pytest.raises(autopipe.EngineError, match="earlier engine"):
        place(model, ["lstm.weight_ih_l0"], weights=None, **options)
    place(model, ["lstm.weight_ih_l0"], weights={"lstm.weight_ih_l0": torch.ones(16, 4)}, **options)
    assert bool((model.lstm.weight_ih_l0 == 1).all())
