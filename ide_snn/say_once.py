"""Messages that are said when they change, not in every step."""

from __future__ import annotations

import logging


class SayOnce:
    """Logs a message unless it is the one that was logged last.

    Attributes:
        latest: what there was to say last, logged or not; None before the first.

    A copy or a pickle has said nothing.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._said: str | None = None
        self.latest: str | None = None

    def __call__(self, message: str, *, warn: bool = False) -> None:
        self.latest = message
        if message != self._said:
            self._said = message
            self._log.log(logging.WARNING if warn else logging.INFO, message)

    def __reduce__(self) -> tuple[type[SayOnce], tuple[logging.Logger]]:
        return SayOnce, (self._log,)
