"""Writing and reading the state of a run, all processes together: spread tensors are gathered, one process writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmdiff.errors import CheckpointError
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
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None

    def newest(self) -> Snapshot | None:
        """The newest whole checkpoint; what killed processes left is removed.

        Raises:
            CheckpointError: There are checkpoints but none is whole.
        """
        found = self._group.first(self._found)
        return None if found is None else self._checkpoints.load(Path(found))

    def save(
        self,
        samples: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        plain: Mapping[str, Any],
        *,
        later: bool = False,
    ) -> Snapshot:
        """Write a checkpoint, after the one that is on its way.

        Args:
            samples: Samples seen, which names it.
            tensors: File stem -> name -> tensor.
            plain: The rest; only the first process's counts.
            later: Copy the state and write it in a thread; an error comes at the next call.

        Raises:
            CheckpointError: It, or the one before, could not be written; every process raises it.
        """
        self._group.first(self._settle)
        groups = {stem: gathered(named, self._group.leads) for stem, named in tensors.items()}
        snapshot = Snapshot(samples=samples, tensors=groups, state=plain)
        if not later:
            self._group.first(lambda: str(self._checkpoints.save(snapshot)))
        elif self._group.leads:
            self._writer = threading.Thread(target=self._write, args=(_copied(snapshot),), name="mmdiff-checkpoint")
            self._writer.start()
        return snapshot

    def close(self) -> None:
        """Wait for the checkpoint that is on its way."""
        if self._writer is not None:
            self._writer.join()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._checkpoints.save(snapshot)
        except CheckpointError as error:
            self._failure = error

    def _settle(self) -> None:
        """Wait for the one on its way, and raise what came of it."""
        self.close()
        failure, self._writer, self._failure = self._failure, None, None
        if failure is not None:
            raise failure

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


def _copied(snapshot: Snapshot) -> Snapshot:
    """The state as it is now, in main memory: training goes on changing the original."""
    tensors = {
        stem: {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
        for stem, named in snapshot.tensors.items()
    }
    return Snapshot(samples=snapshot.samples, tensors=tensors, state=json.loads(json.dumps(snapshot.state)))
