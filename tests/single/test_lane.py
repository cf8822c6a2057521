"""Both ends of a lane in one process: blocks are used again, nothing sent is lost, and no wait outlives its reason."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from autopipe.engine.failures.interrupt import Alarm, available
from autopipe.engine.transport.shm_buffers import MessageLayout
from autopipe.engine.transport.shm_channel import (
    _ANNOUNCED,
    GIVEN_AT_ONCE,
    LARGE_BYTES,
    ShmReceiver,
    ShmSender,
)

pytestmark = pytest.mark.skipif(not available(), reason="needs Linux")


def bytes_of(*values: int, size: int = 100) -> list[Tensor]:
    return [torch.full((size,), v, dtype=torch.uint8) for v in values]


def packing_of(count: int = 1, size: int = 100) -> MessageLayout:
    return MessageLayout([((size,), (1,), torch.uint8)] * count)


ONE = packing_of()


@pytest.fixture
def ends():
    alarm = Alarm()
    inbox = ShmReceiver(alarm)
    outbox = ShmSender(inbox.address)
    inbox.accept()
    yield outbox, inbox, alarm
    outbox.close()
    inbox.close()
    alarm.close()


def test_messages_arrive_in_order_and_blocks_are_used_again(ends) -> None:
    outbox, inbox, _ = ends
    two = packing_of(2)
    expected = [inbox.expect(two) for _ in range(49)]
    for i in range(50):
        message = bytes_of(i, 100 + i)
        outbox.send(message, two)
        message[0].fill_(255)  # what is sent may be written
        if i:
            assert [int(p[0]) for p in expected[i - 1].join()] == [i - 1, 99 + i]
    assert len(outbox._blocks) <= 2 + GIVEN_AT_ONCE
    assert [int(p[0]) for p in expected[0].join()] == [0, 100], "what was taken out of a block stays as it was"


def test_a_larger_message_takes_a_new_block_and_a_smaller_one_fits_into_it(ends) -> None:
    outbox, inbox, _ = ends
    for size in (LARGE_BYTES, 1_000_000, LARGE_BYTES + 7, 5_000_000, LARGE_BYTES):
        packing = packing_of(size=size)
        outbox.send(bytes_of(size % 251, size=size), packing)
        (part,) = inbox.expect(packing).join()
        assert part.shape == (size,)
        assert bool((part == size % 251).all())
    assert len(outbox._blocks) == 1
    assert len(inbox._blocks) == 1


def test_a_block_that_is_free_is_found_behind_one_that_is_too_small(ends) -> None:
    outbox, inbox, _ = ends
    small, large = packing_of(size=100), packing_of(size=LARGE_BYTES)
    for packing, size in ((small, 100), (large, LARGE_BYTES)):
        outbox.send(bytes_of(1, size=size), packing)  # two blocks, since none is given back meanwhile
    for packing in (small, large):
        inbox.expect(packing).join()
    for _ in range(3):
        outbox.send(bytes_of(2, size=LARGE_BYTES), large)
        assert bool((inbox.expect(large).join()[0] == 2).all())
    assert [b.size for b in outbox._blocks] == [128, LARGE_BYTES]


def test_a_block_keeps_its_views_of_repeated_messages_alone(ends) -> None:
    outbox, inbox, _ = ends
    repeated, other = MessageLayout([((100,), (1,), torch.uint8)], repeated=True), packing_of(2, size=30)
    for i in range(3):
        for packing, message in ((repeated, bytes_of(i)), (other, bytes_of(10 + i, 20 + i, size=30))):
            outbox.send(message, packing)
            for there, here in zip(message, inbox.expect(packing).join(), strict=True):
                assert torch.equal(there, here)
    kept = [b.views(repeated)[0] for b in outbox._blocks]
    assert [b.views(repeated)[0] is k for b, k in zip(outbox._blocks, kept, strict=True)] == [True] * len(kept)
    assert all(b.views(other)[0] is not b.views(other)[0] for b in outbox._blocks)
    assert [b.views(repeated)[0] is k for b, k in zip(outbox._blocks, kept, strict=True)] == [True] * len(kept)


def test_tensors_lie_in_a_block_with_the_strides_that_are_due(ends) -> None:
    outbox, inbox, _ = ends
    x = torch.randn(3, 4, 5)
    sent = [x.transpose(0, 2), torch.tensor(3), x[:, ::2], torch.zeros(0, 2), (x > 0).permute(1, 2, 0)]
    due = [((5, 4, 3), (1, 5, 20)), ((), ()), ((3, 2, 5), (10, 5, 1)), ((0, 2), (2, 1)), ((4, 5, 3), (1, 4, 20))]
    packing = MessageLayout([(shape, stride, t.dtype) for (shape, stride), t in zip(due, sent, strict=True)])
    outbox.send(sent, packing)
    arrived = inbox.expect(packing).join()
    for there, here, (_, stride) in zip(sent, arrived, due, strict=True):
        assert torch.equal(there, here)
        assert here.stride() == stride


def test_a_tensor_that_is_not_what_is_due_is_refused(ends) -> None:
    outbox, _, _ = ends
    with pytest.raises(ValueError, match=r"shape \(1,\) and torch.uint8 where one of \(100,\) and torch.uint8 is due"):
        outbox.send(bytes_of(1, size=1), ONE)
    with pytest.raises(ValueError, match=r"torch.float32 where one of \(100,\) and torch.uint8 is due"):
        outbox.send([torch.zeros(100)], ONE)
    assert not outbox._blocks


def test_many_messages_wait_for_a_late_receiver(ends) -> None:
    outbox, inbox, _ = ends
    late = threading.Timer(0.3, lambda: None)
    sender = threading.Thread(target=lambda: [outbox.send(bytes_of(i % 256), ONE) for i in range(1000)], daemon=True)
    sender.start()
    late.start()
    late.join()
    for i in range(1000):
        assert int(inbox.expect(ONE).join()[0][0]) == i % 256
    sender.join(5)
    assert not sender.is_alive()


@pytest.mark.parametrize("moment", ["before", "between"])
def test_what_was_sent_arrives_after_its_sender_has_left(ends, monkeypatch, moment: str) -> None:
    """Before a message is heard of, or between that and the file of its new block."""
    outbox, inbox, _ = ends
    for i in range(GIVEN_AT_ONCE + 2):
        outbox.send(bytes_of(i), ONE)
    for _ in range(GIVEN_AT_ONCE):
        inbox.expect(ONE).join()
    assert not inbox._read, "all are given back, which the sender never reads"
    arrivals = [inbox.expect(ONE) for _ in range(3)]
    file = inbox._file
    monkeypatch.setattr(inbox, "_file", lambda: (outbox.close(), file())[1])
    if moment == "before":
        outbox.close()
    for i in range(2):
        assert arrivals[i].done()
        assert int(arrivals[i].join()[0][0]) == GIVEN_AT_ONCE + i
    with pytest.raises(RuntimeError, match="Connection closed: the process that sends has ended"):
        arrivals[2].join()


def test_a_sender_that_ends_before_it_passes_on_a_new_block_is_an_error(ends) -> None:
    outbox, inbox, _ = ends
    outbox._socket.send(_ANNOUNCED.pack(True, 0, 128))
    outbox.close()
    with pytest.raises(RuntimeError, match="Connection closed: the process that sends has ended"):
        inbox.expect(ONE).join()


def test_a_receiver_that_has_left_is_an_error_of_the_sender(ends) -> None:
    outbox, inbox, _ = ends
    inbox.close()
    with pytest.raises(OSError, match=r"Broken pipe|Connection reset"):
        outbox.send(bytes_of(1), ONE)


def test_an_alarm_ends_a_wait(ends) -> None:
    _, inbox, alarm = ends
    started = time.monotonic()
    threading.Timer(0.2, alarm.ring).start()
    with pytest.raises(RuntimeError, match="Connection closed: the run has failed on another rank"):
        inbox.expect(ONE).join()
    assert time.monotonic() - started < 5
    assert not inbox.expect(ONE).done()


def test_a_message_of_another_size_is_refused(ends) -> None:
    outbox, inbox, _ = ends
    outbox.send(bytes_of(1, size=1000), packing_of(size=1000))
    with pytest.raises(RuntimeError, match="a message of 1024 bytes where one of 128 is due"):
        inbox.expect(ONE).join()
