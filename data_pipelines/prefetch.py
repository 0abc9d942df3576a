"""Running a function ahead of its consumer, in a thread or in worker processes, in order.

Results come in the order of the inputs and errors are raised where their result would have come. Both generators end
their helpers when they are closed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from mmdiff.errors import MmdiffError, ShardError

__all__ = ["prefetch", "worker_batches"]

T = TypeVar("T")


def prefetch(make: Callable[[Any], T], inputs: Iterable[Any], ahead: int) -> Generator[T, None, None]:
    """``map(make, inputs)``, computed by one thread up to ``ahead`` results ahead."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=ahead)
    stop = threading.Event()
    # Not a daemon: one that is inside torch while the interpreter goes down aborts the process.
    thread = threading.Thread(target=_fill, args=(make, iter(inputs), ready, stop), name="mmdiff-data")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                if isinstance(error, StopIteration):
                    return
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


def _fill(make: Callable[[Any], T], inputs: Iterator[Any], ready: queue.Queue[Any], stop: threading.Event) -> None:
    def wanted() -> bool:
        return not stop.is_set() and threading.main_thread().is_alive()

    error: BaseException | None = None
    while error is None and wanted():
        item = None
        try:
            item = make(next(inputs))
        except BaseException as raised:  # handed over; the consumer raises it
            error = raised
        while wanted():
            try:
                ready.put((item, error), timeout=0.1)
                break
            except queue.Full:
                continue


class _Chunks(Dataset):
    """A map-style dataset whose "index" is a part of a batch."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __getitem__(self, chunk: Any) -> Any:
        try:
            return self._make(chunk)
        except MmdiffError as error:
            return error  # raised by the consumer, without a worker's traceback around its message


def worker_batches(
    make: Callable[[Any], T],
    inputs: Iterable[Any],
    workers: int,
    ahead: int,
    start_method: str | None,
    where: Callable[[], str],
) -> Generator[T, None, None]:
    """``map(make, inputs)``, computed by processes, ``ahead`` results ahead each.

    Args:
        make: Must survive the start of a process (no local functions where processes are spawned).
        inputs: May be endless.
        workers: Number of processes.
        ahead: Results per process.
        start_method: ``"fork"``, ``"spawn"``, ``"forkserver"`` or None for the platform's default.
        where: Says what is being read, for the message when a process dies.

    Raises:
        ShardError: A process died.
    """
    batches = iter(
        DataLoader(
            _Chunks(make),
            batch_size=None,
            sampler=inputs,
            num_workers=workers,
            prefetch_factor=ahead,
            multiprocessing_context=start_method,
        )
    )
    try:
        while True:
            try:
                item = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "worker" not in str(error):
                    raise
                raise ShardError(
                    f"a data worker died {where()}; out of memory? try fewer data.workers ({error})"
                ) from error
            if isinstance(item, MmdiffError):
                raise item
            yield item
    finally:
        del batches
