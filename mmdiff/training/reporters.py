"""Showing a run elsewhere while it trains: TensorBoard, Weights & Biases, Trackio. ``log.jsonl`` is always written.

A reporter gets plain numbers by name and the samples seen; none of them can influence the run.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from mmdiff.errors import MissingExtraError

__all__ = ["Reporter", "ReporterName", "numbers_of", "open_reporters"]

ReporterName = Literal["tensorboard", "wandb", "trackio"]


_COUNTS = ("samples", "step")
"""Not among the numbers: they are the axis, or a reserved name."""


class Reporter(Protocol):
    """Where numbers go."""

    def log(self, values: Mapping[str, float], samples: int) -> None:
        """Numbers at a count of samples."""

    def close(self) -> None:
        """All of them are delivered."""


def open_reporters(
    names: Sequence[ReporterName], run_dir: Path, project: str, config: Mapping[str, Any], samples: int
) -> list[Reporter]:
    """The reporters of a run that begins or goes on.

    Args:
        names: Which ones.
        run_dir: Folder of the run; its name is the run's.
        project: Name under which runs are collected.
        config: The run's configuration as plain data.
        samples: Samples seen so far; what was reported of later ones belongs to a part that was lost.

    Raises:
        MissingExtraError: One is not installed.
    """
    return [_OPEN[name](run_dir, project, config, samples) for name in names]


def numbers_of(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a log line by path, such as ``losses/caption``; names and lists are left out."""
    return dict(_numbers(record, prefix))


def _numbers(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key not in _COUNTS:
            yield f"{prefix}{key}", float(value)


class _TensorBoard:
    """Event files in ``run_dir/tensorboard``."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any], samples: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError("tensorboard", "report", "for train.report") from None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=samples + 1 if samples else None)

    def log(self, values: Mapping[str, float], samples: int) -> None:
        """As `Reporter`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, samples)

    def close(self) -> None:
        """As `Reporter`."""
        self._writer.close()


class _Tracker:
    """A service with the interface of wandb, which trackio shares.

    Args:
        module: The package.
        options: Further arguments of its ``init``.
    """

    def __init__(self, module: Any, **options: Any) -> None:
        self._module = module
        module.init(**options)

    def log(self, values: Mapping[str, float], samples: int) -> None:
        """As `Reporter`."""
        self._module.log({**values, "samples": samples}, step=samples)

    def close(self) -> None:
        """As `Reporter`."""
        self._module.finish()


def _wandb(run_dir: Path, project: str, config: Mapping[str, Any], samples: int) -> Reporter:
    try:
        import wandb
    except ImportError:
        raise MissingExtraError("wandb", "wandb", "for train.report") from None
    known = run_dir / "wandb_id.txt"
    if not known.is_file():
        known.write_text(uuid.uuid4().hex, "utf-8")
    return _Tracker(
        wandb,
        project=project,
        name=run_dir.name,
        id=known.read_text("utf-8"),
        resume="allow",
        config=dict(config),
        dir=str(run_dir),
    )


def _trackio(run_dir: Path, project: str, config: Mapping[str, Any], samples: int) -> Reporter:
    try:
        import trackio
    except ImportError:
        raise MissingExtraError("trackio", "trackio", "for train.report") from None
    return _Tracker(trackio, project=project, name=run_dir.name, resume="allow", config=dict(config))


_OPEN = {"tensorboard": _TensorBoard, "wandb": _wandb, "trackio": _trackio}
