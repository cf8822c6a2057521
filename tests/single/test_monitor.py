"""What a monitor concludes from what it sees: of silent ranks, of slow ones, of errors that are only another's echo."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from autopipe.engine.failures.bootstrap import HEARTBEAT_VARIABLE, heartbeat_s
from autopipe.engine.failures.coordinator import WITHOUT_EVIDENCE, verdict
from autopipe.engine.failures.failure import Failure, is_connection_error
from autopipe.engine.failures.process_state import State, host_identity, process_state, started_at
from autopipe.engine.failures.stragglers import Pace, RankPhase, StragglerDetector
from autopipe.errors import ConfigError, EngineError


@pytest.mark.parametrize(
    ("silent_s", "heartbeat", "state", "expected"),
    [
        (4.9, 5.0, "stopped", "well"),
        (5.1, 5.0, "stopped", "stopped"),
        (5.1, 5.0, "gone", "gone"),
        (900.0, 5.0, "running", "busy"),
        (5.1, 5.0, None, "well"),
        (5.0 * WITHOUT_EVIDENCE + 0.1, 5.0, None, "silent"),
        (900.0, 0.0, "stopped", "well"),
    ],
)
def test_a_silent_rank_is_blamed_for_what_is_seen_of_it(
    silent_s: float, heartbeat: float, state: State | None, expected: str
) -> None:
    assert verdict(silent_s, heartbeat, state) == expected


def test_processes_of_this_host_are_seen() -> None:
    assert host_identity() == host_identity()
    process = subprocess.Popen(["sleep", "60"])
    try:
        started = started_at(process.pid)
        assert process_state(process.pid, started) == "running"
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert process_state(process.pid, started) == "stopped"
        assert process_state(process.pid, "another") == "gone"
    finally:
        process.kill()
    deadline = time.monotonic() + 5
    while (
        process_state(process.pid, started) != "gone" and time.monotonic() < deadline
    ):  # a zombie until it is waited for
        time.sleep(0.01)
    assert process_state(process.pid, started) == "gone"
    process.wait()


def _place(phase: str, *, waiting: bool, for_s: float, usual_s: float | None = 0.1, serial: int = 1) -> RankPhase:
    return RankPhase(stage=1, phase=phase, waiting=waiting, for_s=for_s, usual_s=usual_s, serial=serial)


def test_a_rank_is_slow_where_others_wait_for_it_and_it_is_quick_otherwise() -> None:
    waits = _place("forward of micro-batch 3", waiting=True, for_s=2.0)
    busy = _place("backward of micro-batch 0", waiting=False, for_s=2.0)
    slowness = StragglerDetector()
    assert slowness.of_places({0: busy, 1: busy}) == []  # nobody waits: evaluation, say, on all ranks
    assert slowness.of_places({0: waits, 1: _place("the first step", waiting=False, for_s=9.0, usual_s=None)}) == []
    assert slowness.of_places({0: waits, 1: _place("saving", waiting=False, for_s=2.0, usual_s=1.5)}) == []
    said = slowness.of_places({0: waits, 1: busy})
    assert said == [
        "stage 1 on rank 1 is slow: backward of micro-batch 0 takes 2.0 s so far, 20 times as long as usual; rank 0 "
        "waits"
    ]
    assert slowness.of_places({0: waits, 1: busy}) == []  # said once


def _pace(stage: int, measured_us: float, planned_us: float) -> tuple[int, Pace]:
    return stage, Pace(stage=stage, measured_us=measured_us, planned_us=planned_us)


def test_a_stage_is_slow_against_its_plan_and_the_others() -> None:
    slowness = StragglerDetector()
    even = [_pace(0, 90e3, 30e3), _pace(1, 60e3, 20e3)]  # the plan is of a faster device
    assert slowness.of_paces(even) == slowness.of_paces(even) == []
    slow = [_pace(0, 90e3, 30e3), _pace(1, 240e3, 20e3)]
    assert slowness.of_paces(slow) == []  # once is chance
    assert slowness.of_paces(slow) == [
        "stage 1 on rank 1 is slow: 240 ms a micro-batch where its plan and the pace of the other stages give 60 ms, "
        "4.0 times as long"
    ]
    assert slowness.of_paces(slow) == []


def test_only_lost_connections_are_another_ranks_fault() -> None:
    assert is_connection_error(RuntimeError("Application timeout caused pair closure"))
    assert is_connection_error(ConnectionResetError("Connection reset by peer"))
    assert not is_connection_error(ValueError("Connection reset by peer"))
    assert not is_connection_error(EngineError("gloo", remedy="none"))
    assert not is_connection_error(RuntimeError("shapes do not match"))


def test_a_failure_survives_the_way_to_other_ranks() -> None:
    failure = Failure(rank=1, stage=2, phase="forward of micro-batch 3", message="ValueError: " + "x" * 10**6)
    told = Failure(**failure.to_json())
    assert (told.rank, told.stage, told.phase) == (1, 2, "forward of micro-batch 3")
    assert str(told.error()).startswith("stage 2 on rank 1, forward of micro-batch 3: ValueError: xxx")
    assert len(told.message) < 10**4


@pytest.mark.parametrize(("given", "seconds"), [("", 10.0), ("30", 30.0), ("0", 0.0)])
def test_the_heartbeat_is_read_from_the_environment(
    given: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HEARTBEAT_VARIABLE, given)
    assert heartbeat_s() == seconds


@pytest.mark.parametrize("given", ["often", "-1", "0.1", "inf", "nan"])
def test_a_wrong_heartbeat_is_named(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HEARTBEAT_VARIABLE, given)
    with pytest.raises(ConfigError, match="AUTOPIPE_HEARTBEAT_S"):
        heartbeat_s()
