"""Messages between the monitors of the ranks: one JSON object a line over a socket."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

Message = dict[str, Any]
MAX_LINE = 65536


class JsonSocket:
    """One end of a connection. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket, gone_after_s: float) -> None:
        """Takes over a connected socket; a host that answers nothing for `gone_after_s` closes it (0: the system's own
        time)."""
        self.sock = sock
        self._buffer = b""
        self._lock = threading.Lock()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if gone_after_s > 0 and hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * gone_after_s))

    def send(self, message: Message) -> bool:
        """Sends a message; False where the other end is gone."""
        with self._lock, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")
            return True
        return False

    def receive(self) -> list[Message] | None:
        """The messages that have arrived, after the socket was found readable; None where the other end is gone or
        sends no messages."""
        try:
            data = self.sock.recv(MAX_LINE)
        except (BlockingIOError, InterruptedError, TimeoutError):
            return []
        except OSError:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if not data or len(self._buffer) > MAX_LINE:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(m, dict) for m in messages) else None

    def close(self) -> None:
        """Closes the connection."""
        self.sock.close()
