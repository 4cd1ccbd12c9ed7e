"""Ctrl-C and SIGTERM as a request that a loop looks at, not an exception in mid-step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Which signal asked to stop, if any."""

    name: str | None = None
    at: float = 0.0
    """When it came, by `time.monotonic`."""

    def since(self) -> str:
        """How long ago, for people; nothing if this process got none."""
        return f", {time.monotonic() - self.at:.1f} s after the signal" if self.name else ""


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within it Ctrl-C and SIGTERM are noted; a second one acts at once, as it would outside.

    Does nothing in another than the main thread, which gets no signals.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        request.name, request.at = signal.Signals(number).name, time.monotonic()
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, note)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
