"""Both ends of a channel in one process: blocks are used again, nothing sent is lost, and no wait outlives its
reason."""

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
    receiver = ShmReceiver(alarm)
    sender = ShmSender(receiver.address)
    receiver.accept()
    yield sender, receiver, alarm
    sender.close()
    receiver.close()
    alarm.close()


def test_messages_arrive_in_order_and_blocks_are_used_again(ends) -> None:
    sender, receiver, _ = ends
    two = packing_of(2)
    expected = [receiver.expect(two) for _ in range(49)]
    for i in range(50):
        message = bytes_of(i, 100 + i)
        sender.send(message, two)
        message[0].fill_(255)  # what is sent may be written
        if i:
            assert [int(p[0]) for p in expected[i - 1].join()] == [i - 1, 99 + i]
    assert len(sender._blocks) <= 2 + GIVEN_AT_ONCE
    assert [int(p[0]) for p in expected[0].join()] == [0, 100], "what was taken out of a block stays as it was"


def test_a_larger_message_takes_a_new_block_and_a_smaller_one_fits_into_it(ends) -> None:
    sender, receiver, _ = ends
    for size in (LARGE_BYTES, 1_000_000, LARGE_BYTES + 7, 5_000_000, LARGE_BYTES):
        layout = packing_of(size=size)
        sender.send(bytes_of(size % 251, size=size), layout)
        (part,) = receiver.expect(layout).join()
        assert part.shape == (size,)
        assert bool((part == size % 251).all())
    assert len(sender._blocks) == 1
    assert len(receiver._blocks) == 1


def test_a_block_that_is_free_is_found_behind_one_that_is_too_small(ends) -> None:
    sender, receiver, _ = ends
    small, large = packing_of(size=100), packing_of(size=LARGE_BYTES)
    for layout, size in ((small, 100), (large, LARGE_BYTES)):
        sender.send(bytes_of(1, size=size), layout)  # two blocks, since none is given back meanwhile
    for layout in (small, large):
        receiver.expect(layout).join()
    for _ in range(3):
        sender.send(bytes_of(2, size=LARGE_BYTES), large)
        assert bool((receiver.expect(large).join()[0] == 2).all())
    assert [b.size for b in sender._blocks] == [128, LARGE_BYTES]


def test_a_block_keeps_its_views_of_repeated_messages_alone(ends) -> None:
    sender, receiver, _ = ends
    repeated, other = MessageLayout([((100,), (1,), torch.uint8)], repeated=True), packing_of(2, size=30)
    for i in range(3):
        for layout, message in ((repeated, bytes_of(i)), (other, bytes_of(10 + i, 20 + i, size=30))):
            sender.send(message, layout)
            for there, here in zip(message, receiver.expect(layout).join(), strict=True):
                assert torch.equal(there, here)
    kept = [b.views(repeated)[0] for b in sender._blocks]
    assert [b.views(repeated)[0] is k for b, k in zip(sender._blocks, kept, strict=True)] == [True] * len(kept)
    assert all(b.views(other)[0] is not b.views(other)[0] for b in sender._blocks)
    assert [b.views(repeated)[0] is k for b, k in zip(sender._blocks, kept, strict=True)] == [True] * len(kept)


def test_tensors_lie_in_a_block_with_the_strides_that_are_due(ends) -> None:
    sender, receiver, _ = ends
    x = torch.randn(3, 4, 5)
    sent = [x.transpose(0, 2), torch.tensor(3), x[:, ::2], torch.zeros(0, 2), (x > 0).permute(1, 2, 0)]
    due = [((5, 4, 3), (1, 5, 20)), ((), ()), ((3, 2, 5), (10, 5, 1)), ((0, 2), (2, 1)), ((4, 5, 3), (1, 4, 20))]
    layout = MessageLayout([(shape, stride, t.dtype) for (shape, stride), t in zip(due, sent, strict=True)])
    sender.send(sent, layout)
    arrived = receiver.expect(layout).join()
    for there, here, (_, stride) in zip(sent, arrived, due, strict=True):
        assert torch.equal(there, here)
        assert here.stride() == stride


def test_a_tensor_that_is_not_what_is_due_is_refused(ends) -> None:
    sender, _, _ = ends
    with pytest.raises(ValueError, match=r"shape \(1,\) and torch.uint8 where one of \(100,\) and torch.uint8 is due"):
        sender.send(bytes_of(1, size=1), ONE)
    with pytest.raises(ValueError, match=r"torch.float32 where one of \(100,\) and torch.uint8 is due"):
        sender.send([torch.zeros(100)], ONE)
    assert not sender._blocks


def test_many_messages_wait_for_a_late_receiver(ends) -> None:
    sender, receiver, _ = ends
    late = threading.Timer(0.3, lambda: None)
    thread = threading.Thread(target=lambda: [sender.send(bytes_of(i % 256), ONE) for i in range(1000)], daemon=True)
    thread.start()
    late.start()
    late.join()
    for i in range(1000):
        assert int(receiver.expect(ONE).join()[0][0]) == i % 256
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("moment", ["before", "between"])
def test_what_was_sent_arrives_after_its_sender_has_left(ends, monkeypatch, moment: str) -> None:
    """Before a message is heard of, or between that and the file of its new block."""
    sender, receiver, _ = ends
    for i in range(GIVEN_AT_ONCE + 2):
        sender.send(bytes_of(i), ONE)
    for _ in range(GIVEN_AT_ONCE):
        receiver.expect(ONE).join()
    assert not receiver._read, "all are given back, which the sender never reads"
    arrivals = [receiver.expect(ONE) for _ in range(3)]
    file = receiver._file
    monkeypatch.setattr(receiver, "_file", lambda: (sender.close(), file())[1])
    if moment == "before":
        sender.close()
    for i in range(2):
        assert arrivals[i].done()
        assert int(arrivals[i].join()[0][0]) == GIVEN_AT_ONCE + i
    with pytest.raises(RuntimeError, match="Connection closed: the process that sends has ended"):
        arrivals[2].join()


def test_a_sender_that_ends_before_it_passes_on_a_new_block_is_an_error(ends) -> None:
    sender, receiver, _ = ends
    sender._socket.send(_ANNOUNCED.pack(True, 0, 128))
    sender.close()
    with pytest.raises(RuntimeError, match="Connection closed: the process that sends has ended"):
        receiver.expect(ONE).join()


def test_a_receiver_that_has_left_is_an_error_of_the_sender(ends) -> None:
    sender, receiver, _ = ends
    receiver.close()
    with pytest.raises(OSError, match=r"Broken pipe|Connection reset"):
        sender.send(bytes_of(1), ONE)


def test_an_alarm_ends_a_wait(ends) -> None:
    _, receiver, alarm = ends
    started = time.monotonic()
    threading.Timer(0.2, alarm.ring).start()
    with pytest.raises(RuntimeError, match="Connection closed: the run has failed on another rank"):
        receiver.expect(ONE).join()
    assert time.monotonic() - started < 5
    assert not receiver.expect(ONE).done()


def test_a_message_of_another_size_is_refused(ends) -> None:
    sender, receiver, _ = ends
    sender.send(bytes_of(1, size=1000), packing_of(size=1000))
    with pytest.raises(RuntimeError, match="a message of 1024 bytes where one of 128 is due"):
        receiver.expect(ONE).join()
