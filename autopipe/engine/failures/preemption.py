"""Preemption: SIGTERM on any rank lets all ranks finish the step that they are in, save, and exit with 0."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from autopipe.errors import ConfigError


class Preemption:
    """Whether this process was asked to end, and what is saved then.

    Attributes:
        asked: SIGTERM has come.
    """

    def __init__(self) -> None:
        self.asked = False
        self._save: Callable[[], Any] | None = None

    def arm(self, save: Callable[[], Any]) -> None:
        """From now on SIGTERM is noted instead of ending the process.

        Raises:
            ConfigError: this is not the main thread, which alone may handle signals.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                f"save_on_sigterm() on thread {threading.current_thread().name!r}",
                expected="the main thread",
                remedy="call it where the script starts",
            )
        signal.signal(signal.SIGTERM, self._note)
        self._save = save

    def _note(self, *_: Any) -> None:
        self.asked = True

    def save_and_exit(self) -> None:
        """Saves, where this rank was armed, and leaves the script with 0. Collective."""
        if self._save is not None:
            self._save()
            raise SystemExit(0)
