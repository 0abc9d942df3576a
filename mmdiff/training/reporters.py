"""Showing a run elsewhere while it trains: TensorBoard, Weights & Biases, Trackio. ``log.jsonl`` is always written.

A reporter gets plain numbers by name and the samples seen; none of them can influence the run. One that fails (no
network, a full disk) is named once and left out from then on.
"""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from mmdiff.errors import MissingExtraError, redact

__all__ = ["Reporter", "ReporterName", "check_reporters", "numbers_of", "open_reporters"]

ReporterName = Literal["tensorboard", "wandb", "trackio"]

EXTRAS: dict[ReporterName, str] = {"tensorboard": "report", "wandb": "wandb", "trackio": "trackio"}
"""Reporter, which is also the name of its package -> the extra that installs it."""

_COUNTS = ("samples", "step")
"""Not among the numbers: they are the axis, or a reserved name."""


class Reporter(Protocol):
    """Where numbers go."""

    def log(self, values: Mapping[str, float], samples: int) -> None:
        """Numbers at a count of samples."""

    def close(self) -> None:
        """All of them are delivered."""


def check_reporters(names: Sequence[ReporterName]) -> None:
    """Make sure, before time is spent on anything, that the packages of reporters are there.

    Raises:
        MissingExtraError: One is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(name, EXTRAS[name], "for train.report")


@contextmanager
def open_reporters(
    names: Sequence[ReporterName], run_dir: Path, project: str, config: Mapping[str, Any], samples: int
) -> Iterator[list[Reporter]]:
    """The reporters of a run that begins or goes on; closed at the end of the block, however it ends.

    Args:
        names: Which ones.
        run_dir: Folder of the run; its name is the run's.
        project: Name under which runs are collected.
        config: The run's configuration as plain data; addresses in it are passed on without their secrets.
        samples: Samples seen so far; what was reported of later ones belongs to a part that was lost.
    """
    opened: list[Reporter] = []
    config = _without_secrets(config)
    try:
        for name in dict.fromkeys(names):
            opened.append(_Careful(name, partial(_OPEN[name], run_dir, project, config, samples)))
        yield opened
    finally:
        for reporter in opened:
            reporter.close()


def numbers_of(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a log line by path, such as ``losses/caption``; names and lists are left out."""
    return dict(_numbers(record, prefix))


def _numbers(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key not in _COUNTS:
            yield f"{prefix}{key}", float(value)


def _without_secrets(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_secrets(value) for value in tree]
    return redact(tree) if isinstance(tree, str) and "://" in tree else tree


class _Careful:
    """A reporter whose first failure is told and is its last.

    Args:
        name: For the message.
        start: Makes the reporter.
    """

    def __init__(self, name: str, start: Callable[[], Reporter]) -> None:
        self._name = name
        self._inner: Reporter | None = None
        self._try(lambda: setattr(self, "_inner", start()))

    def log(self, values: Mapping[str, float], samples: int) -> None:
        """As `Reporter`."""
        inner = self._inner
        if inner is not None:
            self._try(lambda: inner.log(values, samples))

    def close(self) -> None:
        """As `Reporter`."""
        inner = self._inner
        if inner is not None:
            self._try(inner.close)
        self._inner = None

    def _try(self, action: Callable[[], None]) -> None:
        try:
            # Standard output belongs to the command's result; some services greet there.
            with redirect_stdout(sys.stderr):
                action()
        except Exception as error:
            # Whatever a service's own code raises: a run of days does not depend on it.
            self._inner = None
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            tqdm.write(f"{self._name} gets no more numbers ({text}); training goes on, log.jsonl has all", sys.stderr)


class _TensorBoard:
    """Event files in ``run_dir/tensorboard``."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any], samples: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=samples + 1 if samples else None)

    def log(self, values: Mapping[str, float], samples: int) -> None:
        """As `Reporter`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, samples)
        # A run that is killed loses no line.
        self._writer.flush()

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
    import wandb

    known = run_dir / "wandb_id.txt"
    if not known.is_file():
        known.write_text(uuid.uuid4().hex, "utf-8")
    return _Tracker(
        wandb,
        project=project,
        name=run_dir.name,
        id=known.read_text("utf-8").strip(),
        resume="allow",
        config=dict(config),
        dir=str(run_dir),
    )


def _trackio(run_dir: Path, project: str, config: Mapping[str, Any], samples: int) -> Reporter:
    import trackio

    return _Tracker(trackio, project=project, name=run_dir.name, resume="allow", config=dict(config))


_OPEN: dict[ReporterName, Callable[..., Reporter]] = {"tensorboard": _TensorBoard, "wandb": _wandb, "trackio": _trackio}
