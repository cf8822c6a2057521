"""A flow between two processes of one host: a message lies in memory that both have mapped, and a socket says where.

The sender copies a message into a block of shared memory and writes the block's number to a local socket; the receiver
copies it out and gives the block back. A message so wakes the thread that waits for it and no other, where a library
for networks has a thread at each end, which takes the core from a compute. A send does not wait for its receiver: where
no block is free another is made, so that there are as many as the schedule lets be under way. Blocks have no names, and
travel over the socket as open files: nothing is left behind, however a process ends.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from autopipe.engine.failures.interrupt import Alarm
from autopipe.engine.transport.shm_buffers import Block, MessageLayout, copies

_ANNOUNCED = struct.Struct("=?IQ")
"""Header of a message: new-block flag (the block comes with the next datagram), block, and bytes."""
_GIVEN_BACK = struct.Struct("=I")
"""A block that has been read; several may be given back at once."""
GIVEN_AT_ONCE, LARGE_BYTES = 4, 2**18
"""Blocks that are given back together, unless one of them is large."""
_FILE_BYTES = array.array("i").itemsize
_CREDENTIALS = struct.Struct("=iII")
PATIENCE_S = 60.0
T = TypeVar("T")


class ShmReceiver:
    """The receiving end.

    Attributes:
        address: where it waits for the sender, in Linux's namespace of sockets without files.
    """

    def __init__(self, alarm: Alarm) -> None:
        self._alarm = alarm
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._listener.bind("")  # the system chooses the name
        self._listener.listen(1)
        self.address: bytes = self._listener.getsockname()
        self._blocks: dict[int, Block] = {}
        self._arrived: dict[int, tuple[int, int]] = {}
        self._read: list[int] = []
        self._expected = self._heard = 0

    def accept(self) -> None:
        """Takes the connection that the sender has made.

        Raises:
            OSError: it is another user's.
        """
        self._listener.settimeout(PATIENCE_S)
        self._socket, _ = self._listener.accept()
        self._listener.close()
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] != os.getuid():
            raise PermissionError("a connection from another user's process")
        self._socket.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._poll.register(self._alarm.fd, select.POLLIN)

    def expect(self, layout: MessageLayout, take: Callable[[Sequence[Tensor]], list[Tensor]] = copies) -> Arrival:
        """The next message that was not expected yet.

        Args:
            take: is called with its tensors once it is there; gives what is kept of them.
        """
        self._expected += 1
        return Arrival(self, self._expected - 1, layout, take)

    def has(self, number: int) -> bool:
        """Whether a message has come; does not block."""
        while self._heard <= number:
            if not self._hear():
                return False
        return True

    def fetch(
        self, number: int, layout: MessageLayout, take: Callable[[Sequence[Tensor]], list[Tensor]]
    ) -> list[Tensor]:
        """Waits for a message, and gives what `take` makes of it.

        Raises:
            RuntimeError: the connection is lost, or the message is not of the size expected.
        """
        while self._heard <= number:
            if not self._hear():
                self._wait()
        place, size = self._arrived.pop(number)
        if size != layout.size:
            raise RuntimeError(f"a message of {size} bytes where one of {layout.size} is due")
        taken = take(self._blocks[place].views(layout))
        self._read.append(place)
        if size >= LARGE_BYTES or len(self._read) >= GIVEN_AT_ONCE:
            self._give_back()
        return taken

    def _give_back(self) -> None:
        said = b"".join(map(_GIVEN_BACK.pack, self._read))
        self._read.clear()
        with contextlib.suppress(OSError):  # a sender that has nothing more to send may have left
            self._socket.send(said)

    def _hear(self) -> bool:
        """Takes note of a message, where one has come."""
        try:
            said = self._received(self._socket.recv, _ANNOUNCED.size)
        except BlockingIOError:
            return False
        if not said:
            raise RuntimeError("Connection closed: the process that sends has ended")
        is_new, place, size = _ANNOUNCED.unpack(said)
        if is_new:
            self._blocks[place] = Block.of_file(self._file())
        self._arrived[self._heard] = place, size
        self._heard += 1
        return True

    def _file(self) -> int:
        """The file of a new block, which the sender passes on right after it has said so."""
        while True:
            try:
                space = socket.CMSG_SPACE(_FILE_BYTES)
                _, files, _, _ = self._received(self._socket.recvmsg, 1, space, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                self._wait()
                continue
            if not files:
                raise RuntimeError("Connection closed: the process that sends has ended")
            return int.from_bytes(files[0][2], sys.byteorder)

    def _received(self, receive: Callable[..., T], *args: int) -> T:
        """Result of a call of the socket. A reset says, once, that the sender has left without reading what was given
        back; what it sent is there."""
        try:
            return receive(*args)
        except ConnectionResetError:
            return receive(*args)

    def _wait(self) -> None:
        if all(fd == self._alarm.fd for fd, _ in self._poll.poll()):
            raise RuntimeError("Connection closed: the run has failed on another rank")

    def close(self) -> None:
        """Ends the connection."""
        self._listener.close()
        if hasattr(self, "_socket"):
            self._socket.close()


class ShmSender:
    """The sending end, connected to a receiver's address.

    Raises:
        OSError: it cannot be reached from here.
    """

    def __init__(self, address: bytes) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._blocks: list[Block] = []
        self._free: list[int] = []
        try:
            self._socket.connect(address)
        except OSError:
            self._socket.close()
            raise

    def send(self, tensors: Sequence[Tensor], layout: MessageLayout) -> None:
        """Sends tensors as one message; they may be written when it returns.

        Raises:
            OSError: the receiver is gone.
            ValueError: a tensor is not what the layout says.
        """
        layout.check(tensors)
        place, fd = self._take(layout.size)
        for view, tensor in zip(self._blocks[place].views(layout), tensors, strict=True):
            view.copy_(tensor.detach() if tensor.requires_grad else tensor)
        try:
            self._socket.send(_ANNOUNCED.pack(fd is not None, place, layout.size))
            if fd is not None:
                self._socket.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        finally:
            if fd is not None:
                os.close(fd)

    def _take(self, size: int) -> tuple[int, int | None]:
        """A block of at least this many bytes that nobody reads; with its file where it is new."""
        looked_at = 0
        while looked_at < len(self._free) or self._regain():
            place = self._free[looked_at]
            if self._blocks[place].size >= size:
                del self._free[looked_at]
                return place, None
            looked_at += 1
        fd = os.memfd_create("autopipe", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        place = self._free.pop() if self._free else len(self._blocks)
        self._blocks[place : place + 1] = [Block.of_file(os.dup(fd))]
        return place, fd

    def _regain(self) -> bool:
        """Takes blocks back, where the receiver has given any."""
        try:
            said = self._socket.recv(GIVEN_AT_ONCE * _GIVEN_BACK.size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        self._free += (place for (place,) in _GIVEN_BACK.iter_unpack(said))
        return bool(said)

    def close(self) -> None:
        """Ends the connection; what is under way still arrives."""
        self._socket.close()
        self._blocks.clear()


@dataclass(slots=True)
class Arrival:
    """A message that is expected."""

    _inbox: ShmReceiver
    _number: int
    _packing: MessageLayout
    _take: Callable[[Sequence[Tensor]], list[Tensor]]
    _taken: list[Tensor] | None = None

    def join(self) -> list[Tensor]:
        """Blocks until the message is there, and gives what is kept of it."""
        if self._taken is None:
            self._taken = self._inbox.fetch(self._number, self._packing, self._take)
        return self._taken

    def done(self) -> bool:
        """Whether `join` would not block."""
        return self._taken is not None or self._inbox.has(self._number)
