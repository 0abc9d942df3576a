"""Points at which a test may kill the process while it writes: every step of saving passes one.

``MMDIFF_FAULT=after:<n>`` in the environment ends the process, as ``kill -9`` does, at the n-th point it reaches,
counted from 1. Without the variable a point costs one counter.
"""

from __future__ import annotations

import itertools
import os
import signal
from typing import Literal

__all__ = ["fault"]

_reached = itertools.count(1)


def fault(step: Literal["open", "write", "fsync", "rename", "manifest", "delete"]) -> None:
    """Count one point, and die there if the environment says so.

    Args:
        step: What is about to happen; only for the reader of the code.
    """
    del step
    if os.environ.get("MMDIFF_FAULT") == f"after:{next(_reached)}":
        os.kill(os.getpid(), signal.SIGKILL)
