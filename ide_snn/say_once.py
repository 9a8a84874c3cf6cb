"""Messages that are said when they change, not in every step."""

from __future__ import annotations

import logging


class SayOnce:
    """Logs a message unless it is the one that was logged last.

    Attributes:
        said: that message; None before the first.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self.said: str | None = None

    def __call__(self, message: str, *, warn: bool = False) -> None:
        if message != self.said:
            self.said = message
            self._log.log(logging.WARNING if warn else logging.INFO, message)
