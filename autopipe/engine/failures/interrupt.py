"""An alarm that ends whatever waits on a file descriptor, from any thread."""

from __future__ import annotations

import os
import sys
import threading


def available() -> bool:
    """Whether this system has what channels are made of."""
    return sys.platform == "linux" and hasattr(os, "memfd_create") and hasattr(os, "eventfd")


class Alarm:
    """Ends all waits for messages, from any thread and for good."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC) if available() else -1
        self._lock = threading.Lock()  # a descriptor that was given back may be another file's

    def ring(self) -> None:
        """Every wait, and every one that comes, ends with an error; nothing happens once it is closed."""
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Gives the descriptor back."""
        with self._lock:
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)
