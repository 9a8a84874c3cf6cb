"""Ctrl-C and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequest"]

WAIT = 1.0  # seconds for a worker whose connection has been closed to end
TORCH_HANDLER = "torch.utils.data._utils.signal_handling"  # where what it sets for SIGCHLD is defined


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `signum` and the second raises KeyboardInterrupt.

    Outside the main thread signals cannot be caught: there `signum` stays None.

    The same signal may have ended the workers of a torch DataLoader. Torch then raises RuntimeError wherever the main
    thread is, in the midst of a step too, after which nothing could be saved: see `hold_back_deaths`.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        held_back = self._previous.get(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        if held_back is not None:
            _settle(held_back, wait=isinstance(error, (OSError, EOFError)))
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def hold_back_deaths(self) -> None:
        """Until the exit, the end of a worker is an error where its batch is asked for, and nowhere else.

        To be called after workers were started, since torch sets its handler then.
        """
        if self._previous and hasattr(signal, "SIGCHLD"):
            handler = signal.getsignal(signal.SIGCHLD)
            if getattr(handler, "__module__", None) == TORCH_HANDLER:
                self._previous.setdefault(signal.SIGCHLD, handler)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _handle(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum


def _settle(handler: Callable[[int, None], object], wait: bool) -> None:
    """Tell torch of workers that have ended, without its error: that was raised where a batch was asked for.

    Otherwise it would be raised when any other process ends, wherever the main thread is then.
    """
    until = time.monotonic() + (WAIT if wait else 0.0)
    while True:
        try:
            handler(signal.SIGCHLD, None)
        except RuntimeError:
            return
        if time.monotonic() >= until:
            return
        time.sleep(0.01)
