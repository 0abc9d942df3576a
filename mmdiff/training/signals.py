"""Asking a run to stop: SIGTERM, SIGINT and SIGUSR1 set a flag, a second one ends the process at once.

Under torchrun or accelerate it takes a third one: Ctrl-C and job schedulers signal every process, and the launcher
passes what it gets on to all of them, so that one wish arrives twice.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopFlag"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class StopFlag:
    """Context manager: within it the signals set `raised`; on leaving it the former handlers are back.

    Outside the main thread, where handlers cannot be set, it does nothing.
    """

    def __init__(self) -> None:
        self.raised = False
        self._echoes = int("TORCHELASTIC_RUN_ID" in os.environ)
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._former = {s: signal.signal(s, self._handle) for s in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.raised and self._echoes:
            self._echoes -= 1
            return
        if self.raised:
            _say(f"{name} again: leaving without saving\n")
            os._exit(128 + number)
        self.raised = True
        _say(f"\n{name}: saving after this step; send it again to leave at once\n")


def _say(text: str) -> None:
    # Not through sys.stderr: a handler may interrupt a write to it, and its buffer is not reentrant.
    try:
        os.write(2, text.encode())
    except OSError:
        return
