"""What a rank's engine warns of; a rank is a process of its own, where pytest's `caplog` does not reach."""

from __future__ import annotations

import logging


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def kept_warnings() -> list[str]:
    """A list that the engine's warnings on this rank are added to, from now on."""
    handler = _Kept()
    logging.getLogger("autopipe.engine").addHandler(handler)
    return handler.messages
