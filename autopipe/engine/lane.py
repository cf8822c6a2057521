"""A flow between two processes of one host: a message lies in memory that both have mapped, and a socket says where.

The sender copies a message into a block of shared memory and writes the block's number to a local socket; the receiver copies it
out and gives the block back. A message so wakes the thread that waits for it and no other, where a library for networks has a thread
at each end, which takes the core from a compute. A send does not wait for its receiver: where no block is free another is made, so
that there are as many as the schedule lets be under way. Blocks have no names, and travel over the socket as open files: nothing
is left behind, however a process ends.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import select
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ANNOUNCED = struct.Struct("=IQ")
"""What is said of a message: its block, and its bytes."""
_GIVEN_BACK = struct.Struct("=I")
_ALIGNED = 64
_CREDENTIALS = struct.Struct("=iII")
PATIENCE_S = 60.0


def available() -> bool:
    """Whether this system has what lanes are made of."""
    return sys.platform == "linux" and hasattr(os, "memfd_create") and hasattr(os, "eventfd")


class Alarm:
    """Ends all waits for messages, from any thread and for good."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC) if available() else -1

    def ring(self) -> None:
        """Every wait, and every one that comes, ends with an error."""
        if self.fd >= 0:
            os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Gives the descriptor back."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Inbox:
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
        self._blocks: dict[int, Tensor] = {}
        self._arrived: dict[int, tuple[int, int]] = {}
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

    def expect(self, make_parts: Callable[[], Sequence[Tensor]]) -> Arrival:
        """The next message that was not expected yet, for contiguous tensors of bytes, which are made once it is there."""
        self._expected += 1
        return Arrival(self, self._expected - 1, make_parts)

    def has(self, number: int) -> bool:
        """Whether a message has come; does not block."""
        while self._heard <= number:
            if not self._hear():
                return False
        return True

    def fetch(self, number: int, make_parts: Callable[[], Sequence[Tensor]]) -> None:
        """Waits for a message, and copies it into tensors that it makes then.

        Raises:
            RuntimeError: the connection is lost, or the message is not of the size expected.
        """
        while self._heard <= number:
            if not self._hear():
                self._wait()
        place, size = self._arrived.pop(number)
        parts = make_parts()
        wanted = sum(_room(p) for p in parts)
        if size != wanted:
            raise RuntimeError(f"a message of {size} bytes where one of {wanted} is due")
        offset = 0
        for part in parts:
            part.copy_(self._blocks[place][offset : offset + part.numel()])
            offset += _room(part)
        with contextlib.suppress(OSError):  # a sender that has nothing more to send may have left
            self._socket.send(_GIVEN_BACK.pack(place))

    def _hear(self) -> bool:
        """Takes note of a message, where one has come."""
        try:
            said, files, _, _ = self._socket.recvmsg(
                _ANNOUNCED.size, socket.CMSG_SPACE(array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        except (
            ConnectionResetError
        ):  # the sender has left without reading all that was given back; what it sent is there
            return self._hear()
        if not said:
            raise RuntimeError("Connection closed: the process that sends has ended")
        place, size = _ANNOUNCED.unpack(said)
        if files:
            (fd,) = array.array("i", files[0][2])
            self._blocks[place] = _memory(fd)
        self._arrived[self._heard] = place, size
        self._heard += 1
        return True

    def _wait(self) -> None:
        if all(fd == self._alarm.fd for fd, _ in self._poll.poll()):
            raise RuntimeError("Connection closed: the run has failed on another rank")

    def close(self) -> None:
        """Ends the connection."""
        self._listener.close()
        if hasattr(self, "_socket"):
            self._socket.close()


class Outbox:
    """The sending end, connected to an inbox's address.

    Raises:
        OSError: it cannot be reached from here.
    """

    def __init__(self, address: bytes) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._blocks: list[Tensor] = []
        self._free: list[int] = []
        try:
            self._socket.connect(address)
        except OSError:
            self._socket.close()
            raise

    def send(self, parts: Sequence[Tensor]) -> None:
        """Sends contiguous tensors of bytes as one message; they may be written when it returns.

        Raises:
            OSError: the receiver is gone.
        """
        size = sum(_room(p) for p in parts)
        place, fd = self._take(size)
        offset = 0
        for part in parts:
            self._blocks[place][offset : offset + part.numel()].copy_(part)
            offset += _room(part)
        said = [_ANNOUNCED.pack(place, size)]
        if fd is None:
            self._socket.sendmsg(said)
            return
        try:
            self._socket.sendmsg(said, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        finally:
            os.close(fd)

    def _take(self, size: int) -> tuple[int, int | None]:
        """A block of at least this many bytes that nobody reads; with its file where it is new."""
        with contextlib.suppress(BlockingIOError):
            while said := self._socket.recv(_GIVEN_BACK.size, socket.MSG_DONTWAIT):
                self._free += _GIVEN_BACK.unpack(said)
        for i, place in enumerate(self._free):
            if self._blocks[place].numel() >= size:
                del self._free[i]
                return place, None
        fd = os.memfd_create("autopipe", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        place = self._free.pop() if self._free else len(self._blocks)
        self._blocks[place : place + 1] = [_memory(os.dup(fd))]
        return place, fd

    def close(self) -> None:
        """Ends the connection; what is under way still arrives."""
        self._socket.close()
        self._blocks.clear()


@dataclass(slots=True)
class Arrival:
    """A message that is expected; to be waited for as torch's `Work` is."""

    _inbox: Inbox
    _number: int
    _make_parts: Callable[[], Sequence[Tensor]]
    _done: bool = False

    def wait(self) -> None:
        """Blocks until the message is there, and copies it."""
        if not self._done:
            self._inbox.fetch(self._number, self._make_parts)
            self._done = True

    def is_completed(self) -> bool:
        """Whether `wait` would not block."""
        return self._done or self._inbox.has(self._number)


def _room(part: Tensor) -> int:
    """The bytes of a block that a tensor of bytes takes."""
    return -(-part.numel() // _ALIGNED) * _ALIGNED


def _memory(fd: int) -> Tensor:
    """The bytes of a file in memory, mapped; the descriptor is closed."""
    try:
        return torch.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), dtype=torch.uint8)
    finally:
        os.close(fd)
