"""The processes of a run, and small plain data between them: sums of numbers, JSON, decisions of the first one.

All of it goes over gloo and through the CPU, beside whatever carries gradients, so that a message never waits behind a
kernel and a dead process is noticed at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmdiff import errors
from mmdiff.errors import ConfigError, MmdiffError

__all__ = ["Group", "joined", "launched_world"]


def launched_world() -> int:
    """Number of processes that torchrun, accelerate or a cluster's launcher started, from ``WORLD_SIZE``.

    Raises:
        ConfigError: It is no number, or the other variables of a launcher are missing.
    """
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"WORLD_SIZE={text!r} is not a number of processes")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if int(text) > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE={text} but {', '.join(missing)} is not set; start the processes with torchrun, with "
            "accelerate launch, or set all of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    return int(text)


class Group:
    """Processes that train together; a group of one exchanges nothing.

    Every method but the properties must be called by all of them, in the same order.

    Args:
        store: Where processes leave notes for each other; None in a group of one.
        control: Process group of the CPU; None in a group of one.
    """

    def __init__(self, store: Any = None, control: Any = None) -> None:
        self.store, self._control = store, control
        self.rank = dist.get_rank(control) if control is not None else 0
        self.world = dist.get_world_size(control) if control is not None else 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all processes, in double precision."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def most(self, numbers: Sequence[float]) -> list[float]:
        """Largest values over all processes."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set anywhere."""
        return self.most([float(flag)])[0] > 0

    def gather(self, tree: Any) -> list[Any]:
        """Plain data of all processes, in the order of their ranks."""
        if self.world == 1:
            return [tree]
        data = json.dumps(tree).encode()
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._control)
        longest = int(max(size.item() for size in sizes))
        padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self._control)
        return [json.loads(bytes(part.tolist())) for part in parts]

    def first(self, action: Callable[[], Any]) -> Any:
        """What ``action`` gives in the first process, as plain data; the others do not run it.

        Raises:
            MmdiffError: ``action`` raised it; every process raises the same.
        """
        if self.world == 1:
            return action()
        outcome: dict[str, Any] = {}
        caught: MmdiffError | None = None
        if self.leads:
            try:
                outcome["result"] = action()
            except MmdiffError as error:
                caught = error
                outcome["error"] = [type(error).__name__, str(error)]
        outcome = self.gather(outcome)[0]
        if "error" not in outcome:
            return outcome["result"]
        name, text = outcome["error"]
        kind = getattr(errors, name, MmdiffError)
        raise caught or (kind if kind in (errors.CheckpointError, errors.ShardError, ConfigError) else MmdiffError)(
            text
        )

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.any(False)

    def _reduced(self, numbers: Sequence[float], op: Any) -> list[float]:
        if self.world == 1 or not numbers:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, op, group=self._control)
        return tensor.tolist()


@contextmanager
def joined(limit: float) -> Iterator[Group]:
    """Join the other processes that were launched; a group of one if there are none.

    A process group that is there already is used and left as it is.

    Args:
        limit: Seconds after which an exchange of gradients gives up.

    Raises:
        ConfigError: The launcher's variables are incomplete, or the others cannot be reached.
    """
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() == 1:
            yield Group()
            return
        yield Group(dist.distributed_c10d._get_default_store(), dist.new_group(backend="gloo"))
        return
    if launched_world() == 1:
        yield Group()
        return
    timeout = timedelta(seconds=limit)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(f"the other processes cannot be reached at {where} ({error})") from None
    yield Group(store, dist.new_group(backend="gloo", timeout=timeout))
    # After an error the process ends; taking a group apart whose other members are gone may hang.
    dist.destroy_process_group()
