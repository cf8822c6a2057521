"""Both ends of a lane in one process: blocks are used again, nothing sent is lost, and no wait outlives its reason."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
import torch
from torch import Tensor

from autopipe.engine.lane import Alarm, Inbox, Outbox, available

pytestmark = pytest.mark.skipif(not available(), reason="needs Linux")


def bytes_of(*values: int, size: int = 100) -> list[Tensor]:
    return [torch.full((size,), v, dtype=torch.uint8) for v in values]


def empty(count: int, size: int = 100) -> list[Tensor]:
    return bytes_of(*[0] * count, size=size)


@pytest.fixture
def ends():
    alarm = Alarm()
    inbox = Inbox(alarm)
    outbox = Outbox(inbox.address)
    inbox.accept()
    yield outbox, inbox, alarm
    outbox.close()
    inbox.close()
    alarm.close()


def test_messages_arrive_in_order_and_blocks_are_used_again(ends) -> None:
    outbox, inbox, _ = ends
    parts = [empty(2) for _ in range(50)]
    expected = [inbox.expect(partial(parts.__getitem__, i)) for i in range(49)]
    for i in range(50):
        message = bytes_of(i, 100 + i)
        outbox.send(message)
        message[0].fill_(255)  # what is sent may be written
        if i:
            expected[i - 1].wait()
            assert [int(p[0]) for p in parts[i - 1]] == [i - 1, 99 + i]
    assert len(outbox._blocks) <= 3


def test_a_larger_message_takes_a_new_block_and_a_smaller_one_fits_into_it(ends) -> None:
    outbox, inbox, _ = ends
    for size in (10, 100_000, 7, 5_000_000, 64):
        outbox.send(bytes_of(size % 251, size=size))
        parts = empty(1, size)
        inbox.expect(partial(list, parts)).wait()
        assert bool((parts[0] == size % 251).all())
    assert len(outbox._blocks) == 1
    assert len(inbox._blocks) == 1


def test_many_messages_wait_for_a_late_receiver(ends) -> None:
    outbox, inbox, _ = ends
    late = threading.Timer(0.3, lambda: None)
    sender = threading.Thread(target=lambda: [outbox.send(bytes_of(i % 256)) for i in range(1000)], daemon=True)
    sender.start()
    late.start()
    late.join()
    for i in range(1000):
        parts = empty(1)
        inbox.expect(partial(list, parts)).wait()
        assert int(parts[0][0]) == i % 256
    sender.join(5)
    assert not sender.is_alive()


def test_what_was_sent_arrives_after_its_sender_has_left(ends) -> None:
    outbox, inbox, _ = ends
    for i in range(3):
        outbox.send(bytes_of(i))
    (first,) = empty(1)
    inbox.expect(lambda: [first]).wait()  # given back, which the sender never reads
    outbox.close()
    parts = [empty(1) for _ in range(3)]
    arrivals = [inbox.expect(partial(parts.__getitem__, i)) for i in range(3)]
    for i in (1, 2):
        assert arrivals[i - 1].is_completed()
        arrivals[i - 1].wait()
        assert int(parts[i - 1][0][0]) == i
    with pytest.raises(RuntimeError, match="Connection closed: the process that sends has ended"):
        arrivals[2].wait()


def test_a_receiver_that_has_left_is_an_error_of_the_sender(ends) -> None:
    outbox, inbox, _ = ends
    inbox.close()
    with pytest.raises(OSError, match=r"Broken pipe|Connection reset"):
        outbox.send(bytes_of(1))


def test_an_alarm_ends_a_wait(ends) -> None:
    _, inbox, alarm = ends
    started = time.monotonic()
    threading.Timer(0.2, alarm.ring).start()
    with pytest.raises(RuntimeError, match="Connection closed: the run has failed on another rank"):
        inbox.expect(partial(empty, 1)).wait()
    assert time.monotonic() - started < 5
    assert not inbox.expect(partial(empty, 1)).is_completed()


def test_a_message_of_another_size_is_refused(ends) -> None:
    outbox, inbox, _ = ends
    outbox.send(bytes_of(1, size=1000))
    with pytest.raises(RuntimeError, match="a message of 1024 bytes where one of 128 is due"):
        inbox.expect(partial(empty, 1)).wait()
