"""What a demo run has decided and done so far, in ``demo.json``: it makes the run resumable and repeatable."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmdiff.errors import ConfigError

__all__ = ["DemoState"]

_NAME = "demo.json"


@dataclass
class DemoState:
    """The run's sample counts and finished stages.

    Attributes:
        folder: Where the run lives.
        seed: Seed of every stage.
        minutes: What ``--minutes`` asked for; None = the recipes' own sample counts.
        samples: Samples of each training stage; empty until calibrated.
        speed: Samples per second that the calibration measured, per training stage.
        seconds: Wall time of each finished stage, summed over interruptions.
        done: Names of the finished stages, in order.
    """

    folder: Path
    seed: int = 0
    minutes: float | None = None
    samples: dict[str, int] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, *, seed: int | None, minutes: float | None, resume: bool) -> DemoState:
        """Start a run in ``folder``, or continue the one that is there.

        Raises:
            ConfigError: The folder holds a run and ``resume`` is off, or it was started with other settings.
        """
        path = folder / _NAME
        if not path.exists():
            if folder.exists() and any(folder.iterdir()):
                raise ConfigError(f"{folder}: is not empty and holds no demo run; choose another folder with --out")
            return cls(folder=folder, seed=seed or 0, minutes=minutes)
        if not resume:
            raise ConfigError(f"{folder}: holds a demo run; continue it with --resume, or choose another --out")
        try:
            saved = cls(folder=folder, **json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ConfigError(f"{path}: is no state of a demo run; choose another folder with --out") from None
        if seed is not None and seed != saved.seed:
            raise ConfigError(f"{folder}: was started with --seed {saved.seed}, not {seed}; leave it out")
        if minutes is not None and minutes != saved.minutes:
            raise ConfigError(f"{folder}: was started with --minutes {saved.minutes}, not {minutes}; leave it out")
        return saved

    def save(self) -> None:
        """Write the state, by temporary file and rename."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tree = asdict(self)
        del tree["folder"]
        partial = self.folder / f"{_NAME}.tmp"
        partial.write_text(json.dumps(tree, indent=1))
        os.replace(partial, self.folder / _NAME)
