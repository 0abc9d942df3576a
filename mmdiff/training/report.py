"""What a run tells: ``log.jsonl``, and a progress bar or plain lines on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmdiff.errors import CheckpointError

__all__ = ["TIMING_FIELDS", "Clock", "Log", "Meter", "Progress"]

TIMING_FIELDS = frozenset({"samples_per_second", "tokens_per_second", "images_per_second", "mfu", "data_wait", "eta_s"})
"""Fields of a log line that depend on the machine; all others are a function of the configuration."""


class Log:
    """Appends one JSON object per line.

    Args:
        path: The file.
        size: Bytes to keep of what is there; the rest was written after the checkpoint that a run goes on from.
        on: False writes nothing: another process does.

    Raises:
        CheckpointError: It cannot be opened.
    """

    def __init__(self, path: Path, size: int, on: bool = True) -> None:
        self.path, self._file = path, None
        if not on:
            return
        try:
            # Unbuffered: after a full disk, closing a buffered file would try to write again and fail again.
            self._file = path.open("ab", buffering=0)
            self._file.truncate(min(size, path.stat().st_size))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; it reaches the operating system at once."""
        if self._file is None:
            return
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written ({error.strerror}); it needs {len(line):,} bytes more; "
                "make room, then go on with --resume"
            ) from None

    def size(self) -> int:
        """Bytes of the file, all of them on disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class Meter:
    """Means of losses: over the steps since the last line, and smoothed with a half-life.

    Args:
        halflife: Samples after which a step counts half in the smoothed values.
    """

    def __init__(self, halflife: float) -> None:
        self._halflife = halflife
        self._window: dict[str, list[float]] = {}
        self._smooth: dict[str, list[float]] = {}

    def add(self, terms: Mapping[str, tuple[float, float]], samples: int) -> None:
        """Count a step of ``samples`` samples: name -> (sum, number of summands)."""
        keep = 0.5 ** (samples / self._halflife)
        for name, (total, count) in terms.items():
            window = self._window.setdefault(name, [0.0, 0.0])
            window[0] += total
            window[1] += count
            value, weight = self._smooth.get(name, (0.0, 0.0))
            self._smooth[name] = [keep * value + (1 - keep) * total / count, keep * weight + (1 - keep)]

    def take(self) -> dict[str, float]:
        """Means since the last call."""
        means = {name: total / count for name, (total, count) in sorted(self._window.items())}
        self._window = {}
        return means

    def smoothed(self) -> dict[str, float]:
        """Smoothed values."""
        return {name: value / weight for name, (value, weight) in sorted(self._smooth.items())}

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"window": self._window, "smooth": self._smooth}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._window, self._smooth = dict(saved["window"]), dict(saved["smooth"])


class Clock:
    """What is done per second since the last reading, and the share of the time spent waiting for data."""

    def __init__(self) -> None:
        self._done: Counter[str] = Counter()
        self._waited, self._since = 0.0, time.perf_counter()

    def count(self, waited: float = 0.0, **done: float) -> None:
        """A step before which the loop waited ``waited`` seconds, and what was done in it, by name."""
        self._done.update(done)
        self._waited += waited

    def read(self) -> tuple[dict[str, float], float]:
        """(name -> per second, data-wait fraction) since the last reading; starts anew."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        rates = {name: count / seconds for name, count in self._done.items()}
        waited = min(self._waited / seconds, 1.0)
        self._done.clear()
        self._waited, self._since = 0.0, time.perf_counter()
        return rates, waited

    def leave_out(self, seconds: float) -> None:
        """Do not count ``seconds`` that were not spent on training."""
        self._since += seconds


class Progress:
    """A bar on a terminal, else one plain line per log line; nothing if off.

    Args:
        on: Show anything.
        total: Samples of the run.
        done: Samples seen already.
        label: Shown in front.
    """

    def __init__(self, on: bool, total: int, done: int, label: str) -> None:
        terminal = on and sys.stderr.isatty()
        self._plain = on and not terminal
        self._total, self._label, self._pace = total, label or "train", ""
        self._bar = tqdm(
            total=total,
            initial=min(done, total),
            desc=self._label,
            unit=" samples",
            unit_scale=True,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not terminal,
        )

    def advance(self, samples: int, losses: Mapping[str, float]) -> None:
        """Move by ``samples`` and show the smoothed losses, with the speeds of the last log line."""
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{_losses(losses)}{self._pace}", refresh=False)
            self._bar.update(samples)

    def line(self, record: Mapping[str, Any]) -> None:
        """Show a log line, where there is no bar; a bar takes its speeds."""
        self._pace = f"  {_pace(record)}"
        if self._plain:
            eta = timedelta(seconds=round(record["eta_s"]))
            skipped = "".join(f"  {name} {count:,}" for name, count in record["skipped"].items())
            losses = {"loss": record["loss"]} if record["loss"] is not None else {}
            sys.stderr.write(
                f"{self._label}  {record['samples']:,}/{self._total:,} samples  "
                f"{_losses({**losses, **record['losses']})}  "
                f"lr {record['lr']:.2e}  {_pace(record)}{skipped}  ETA {eta}\n"
            )
            sys.stderr.flush()

    def say(self, text: str) -> None:
        """Show one sentence without disturbing the bar."""
        if self._plain or not self._bar.disable:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def _pace(record: Mapping[str, Any]) -> str:
    names = [n for n in ("samples", "tokens", "images") if record[f"{n}_per_second"] or n == "samples"]
    told = [f"{record[f'{name}_per_second']:,.1f} {name}/s" for name in names]
    share = "unknown" if record["mfu"] is None else f"{record['mfu']:.1%}"
    return "  ".join([*told, f"MFU {share}", f"data {record['data_wait']:.0%}"])


def _losses(losses: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in losses.items())
