"""Points at which a test may kill the process while it writes: every step of saving passes one.

``MMDIFF_FAULT=after:<n>`` in the environment ends the process, as ``kill -9`` does, at the n-th point it reaches,
counted from 1; ``MMDIFF_FAULT=slow:<seconds>`` makes every point take so long, as a slow disk does. Without it
a point costs one counter.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from typing import Literal

__all__ = ["fault"]

_reached = itertools.count(1)


def fault(step: Literal["open", "write", "fsync", "rename", "manifest", "delete"]) -> None:
    """Count one point, and die or dawdle there if the environment says so.

    Args:
        step: What is about to happen; only for the reader of the code.
    """
    del step
    kind, _, value = os.environ.get("MMDIFF_FAULT", "").partition(":")
    if kind == "after" and value == str(next(_reached)):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "slow":
        time.sleep(float(value))
