"""What every ``python -m eval.NAME`` does with its result and its errors."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

from mmdiff.errors import MmdiffError

__all__ = ["finish"]


def finish(measure: Callable[[], Any]) -> int:
    """Run a measure; its dataclass goes to stdout as JSON, an expected error to stderr. Returns the exit code."""
    try:
        result = measure()
    except MmdiffError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return 0
