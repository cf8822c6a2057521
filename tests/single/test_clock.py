"""The host does not run ahead of a device by more than a few computes, whatever the number of micro-batches."""

from __future__ import annotations

import pytest
import torch

from autopipe.engine.failures.monitor import RankMonitor
from autopipe.engine.step.clock import RUN_AHEAD, StepClock
from autopipe.schedule import Action


class Device:
    """A device that does what it is told only when it is waited for."""

    def __init__(self) -> None:
        self.recorded = self.reached = 0

    def record(self) -> Event:
        self.recorded += 1
        return Event(self, self.recorded)


class Event:
    def __init__(self, device: Device, number: int) -> None:
        self.device, self.number = device, number

    def synchronize(self) -> None:
        self.device.reached = max(self.device.reached, self.number)


def test_the_host_stays_a_fixed_number_of_spans_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    device, ahead = Device(), []
    monkeypatch.setattr(StepClock, "now", lambda self: device.record())
    clock = StepClock(torch.device("cuda"), RankMonitor())
    for m in range(50):
        for kind in ("F", "B"):
            with clock.span(Action(kind, 0, m)):
                ahead.append(device.recorded - device.reached)
    events_a_span = 2
    assert max(ahead) <= events_a_span * (RUN_AHEAD + 1)
    assert min(ahead[2 * RUN_AHEAD :]) > events_a_span * (RUN_AHEAD - 1), "the device always has work"


def test_on_a_cpu_there_is_nothing_to_wait_for() -> None:
    clock = StepClock(torch.device("cpu"), RankMonitor())
    for m in range(2 * RUN_AHEAD):
        with clock.span(Action("F", 0, m)):
            pass
    assert [str(s.action) for s in clock.spans()] == [f"0F{m}" for m in range(2 * RUN_AHEAD)]
