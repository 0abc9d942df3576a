"""Writing and reading the state of a run, all processes together: spread tensors are gathered, one process writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmdiff.training.parallel.group import Group
from mmdiff.training.parallel.sharding import gathered
from mmdiff.training.state import Checkpoints, Snapshot

__all__ = ["Saver"]


class Saver:
    """The checkpoints of a run of several processes, which see the same folder.

    Args:
        checkpoints: Where they are.
        group: The processes.
    """

    def __init__(self, checkpoints: Checkpoints, group: Group) -> None:
        self._checkpoints, self._group = checkpoints, group

    def newest(self) -> Snapshot | None:
        """The newest whole checkpoint; what killed processes left is removed.

        Raises:
            CheckpointError: There are checkpoints but none is whole.
        """
        found = self._group.first(self._found)
        return None if found is None else self._checkpoints.load(Path(found))

    def save(self, samples: int, tensors: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, Any]) -> Snapshot:
        """Write a checkpoint.

        Args:
            samples: Samples seen, which names it.
            tensors: File stem -> name -> tensor.
            plain: The rest; only the first process's counts.

        Raises:
            CheckpointError: It could not be written; every process raises it.
        """
        groups = {stem: gathered(named, self._group.leads) for stem, named in tensors.items()}
        snapshot = Snapshot(samples=samples, tensors=groups, state=plain)
        self._group.first(lambda: str(self._checkpoints.save(snapshot)))
        return snapshot

    def path(self, samples: int) -> Path:
        """Where the checkpoint of so many samples is."""
        return self._checkpoints.path(samples)

    def _found(self) -> str | None:
        self._checkpoints.clean()
        path = self._checkpoints.latest()
        if path is None:
            return None
        self._checkpoints.set_aside_newer(path)
        return str(path)
