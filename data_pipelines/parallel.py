"""Parts of a job, done by one or several processes; what is done does not depend on how many there are.

Every process takes its fixed share of the parts and ends when the process that started it is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from mmdiff.errors import MmdiffError, ShardError

__all__ = ["Tick", "orphaned", "run_parts"]

T = TypeVar("T")
Tick = Callable[[int], None]
"""Called with a number of samples that were done since the last call."""


def run_parts(
    make: Callable[[int, Tick], T], parts: Sequence[int], workers: int, tick: Tick = lambda done: None
) -> Iterator[tuple[int, T]]:
    """``(part, make(part, tick))`` for every part, in the order in which they are done.

    Args:
        make: Does one part; must survive the start of a process if there are several.
        parts: Numbers of the parts.
        workers: Number of processes; 1 works in this one.
        tick: Called here with what ``make`` reports there.

    Raises:
        MmdiffError: What ``make`` raised.
        ShardError: A process died.
    """
    workers = min(workers, len(parts))
    if workers <= 1:
        yield from ((part, make(part, tick)) for part in parts)
        return
    context = multiprocessing.get_context()
    helpers: dict[Connection, Any] = {}
    try:
        for number in range(workers):
            here, there = context.Pipe(duplex=False)
            share = list(parts[number::workers])
            helper = context.Process(target=_serve, args=(make, share, there), daemon=True)
            helper.start()
            there.close()
            helpers[here] = helper
        yield from _collect(helpers, tick)
    finally:
        for helper in helpers.values():
            helper.terminate()
            helper.join()


def orphaned() -> bool:
    """Whether this is a process for some parts whose starter is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return False
    try:
        os.kill(parent.pid or 0, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return not parent.is_alive()


def _collect(helpers: dict[Connection, Any], tick: Tick) -> Iterator[tuple[int, Any]]:
    running = dict(helpers)
    while running:
        for connection in wait(list(running)):
            if not isinstance(connection, Connection):
                continue
            try:
                kind, value = connection.recv()
            except EOFError:
                helper = running.pop(connection)
                helper.join()
                if helper.exitcode:
                    raise ShardError(
                        f"a process died (exit code {helper.exitcode}); out of memory? Run the command again to go on, "
                        "with fewer --workers"
                    ) from None
                continue
            if kind == "error":
                raise value
            if kind == "tick":
                tick(value)
            else:
                yield value


def _serve(make: Callable[[int, Tick], Any], parts: Sequence[int], out: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    try:
        for part in parts:
            if orphaned():
                return
            out.send(("done", (part, make(part, lambda done: out.send(("tick", done))))))
    except MmdiffError as error:
        out.send(("error", error))
    except BrokenPipeError:
        return  # nobody listens any more
    finally:
        out.close()
