"""Noticing that nothing happens: a thread that knows the last completed step and what the main thread is doing.

After half the time allowed for a step it says so, with the stack of the main thread. After all of it, where several
processes wait for each other, it names those that are late and ends the process: a collective operation that hangs
cannot be interrupted otherwise. Checkpoints are written under another name first, so ending is safe at any moment.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from mmdiff.errors import MmdiffError
from mmdiff.training.parallel.group import Group

__all__ = ["Watch"]

_BEAT = 0.5
_LOST = 2.5
"""Seconds without a beat after which a process counts as gone."""
_LONG = ("starting", "saving", "looking")
"""What may take as long as the first step."""


class Watch:
    """Context manager around a run; within it a thread watches over the main one.

    Args:
        group: The processes; in a group of one nothing is ended, only told.
        usual: Seconds allowed for a step.
        first: Seconds allowed for the first step of the process, for saving and for probes.
        where: Tells which shards are being read.
    """

    def __init__(self, group: Group, usual: float, first: float, where: Callable[[], str]) -> None:
        self.group, self._usual, self._first, self._where = group, usual, first, where
        self._step, self._doing, self._since = 0, "starting", time.monotonic()
        self._fresh, self._told, self._beats = True, False, 0
        self._main = threading.current_thread().ident
        self._end = threading.Event()
        # A connection of its own: the main thread may be waiting on the other one.
        self._store = group.store.clone() if hasattr(group.store, "clone") else group.store
        self._thread = threading.Thread(target=self._watch, name="mmdiff-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        # Beating goes on until it is explained, so that the others do not take this process for a dead one.
        explained = self._explained(error) if isinstance(error, Exception) and self.group.world > 1 else None
        self._end.set()
        self._thread.join(timeout=2 * _BEAT)
        if explained is not None:
            raise explained from error

    def doing(self, what: str) -> None:
        """The main thread begins something: ``reading``, ``computing``, ``waiting``, ``saving``, ``looking``."""
        long = what in _LONG or self._doing in _LONG
        self._doing = what
        if long:
            self._restart()

    def completed(self, step: int) -> None:
        """A step was completed."""
        self._step, self._fresh = step, False
        self._restart()

    def begin(self, step: int) -> None:
        """Step number ``step`` is the last one that an earlier process completed."""
        self._step = step

    def _restart(self) -> None:
        self._since, self._told = time.monotonic(), False

    def _watch(self) -> None:
        while not self._end.wait(_BEAT):
            self._beat()
            waited = time.monotonic() - self._since
            limit = self._first if self._fresh or self._doing in _LONG else self._usual
            if waited > limit / 2 and not self._told:
                self._told = True
                _say(self._story(waited))
            if waited > limit and self.group.world > 1:
                _say(f"{self._me()}: nothing for {waited:.0f} s, allowed are {limit:g} s; {self._late()}\n")
                # The first process may keep the notes that the others still read.
                time.sleep(2 * _BEAT * self.group.leads)
                os._exit(MmdiffError.exit_code)

    def _me(self) -> str:
        rank = f"rank {self.group.rank}: " if self.group.world > 1 else ""
        return f"{rank}last completed step {self._step:,}, {self._doing}"

    def _story(self, waited: float) -> str:
        frame = sys._current_frames().get(self._main or 0)
        stack = "".join(traceback.format_stack(frame)[-12:]) if frame else ""
        return f"{self._me()}: nothing for {waited:.0f} s; reading {self._where()}\n{stack}"

    def _beat(self) -> None:
        self._beats += 1
        self._note("alive", {"step": self._step, "doing": self._doing, "beats": self._beats})

    def _note(self, kind: str, tree: dict[str, Any]) -> None:
        if self._store is None:
            return
        try:
            self._store.set(f"mmdiff/{kind}/{self.group.rank}", json.dumps(tree))
        except RuntimeError:
            self._store = None  # the process that kept it is gone; `_explained` says so

    def _notes(self, kind: str) -> dict[int, dict[str, Any]]:
        """Rank -> its note, of those that left one."""
        out = {}
        for rank in range(self.group.world):
            key = f"mmdiff/{kind}/{rank}"
            if self._store is not None and self._store.check([key]):
                out[rank] = json.loads(self._store.get(key))
        return out

    def _late(self) -> str:
        """Who keeps the others waiting."""
        try:
            gone, notes = self._gone(), self._notes("alive")
        except RuntimeError:
            return _NO_STORE
        if gone:
            return _gone(gone)
        late = {r: n for r, n in notes.items() if n["doing"] != "waiting"}
        return "; ".join(f"rank {r} is {n['doing']} after step {n['step']:,}" for r, n in (late or notes).items())

    def _gone(self) -> list[int]:
        """Ranks that have stopped to beat, or never did."""
        before = self._notes("alive")
        for _ in range(round(_LOST / _BEAT)):
            time.sleep(_BEAT)
            self._beat()
        after = self._notes("alive")
        return [r for r in range(self.group.world) if after.get(r, {}).get("beats") == before.get(r, {}).get("beats")]

    def _explained(self, error: Exception) -> Exception:
        """The error with the rank and the last step, or the other process's if this one only suffered from it."""
        me = f"rank {self.group.rank}, last completed step {self._step:,}"
        advice = "; the checkpoints before it are intact: start again with --resume"
        own = isinstance(error, MmdiffError | OSError) or not _from_exchange(error)
        if own:
            self._note("failed", {"step": self._step, "text": str(error)[:2000]})
            if isinstance(error, MmdiffError):
                kind = MmdiffError if type(error).__init__ is not Exception.__init__ else type(error)
                return kind(f"{me}: {error}")
            return MmdiffError(f"{me}: {type(error).__name__}: {error}{advice}")
        try:
            cause = self._cause()
        except RuntimeError:
            cause = _NO_STORE
        return MmdiffError(f"{cause}; this is {me}{advice}")

    def _cause(self) -> str:
        gone = [rank for rank in self._gone() if rank != self.group.rank]
        failed = {r: n for r, n in self._notes("failed").items() if r != self.group.rank}
        if failed:
            return "; ".join(f"rank {r} failed after step {n['step']:,}: {n['text']}" for r, n in failed.items())
        return _gone(gone) if gone else "an exchange with the other processes failed"


_NO_STORE = "rank 0, or the launcher that kept its notes, is gone"


def _gone(ranks: list[int]) -> str:
    return "; ".join(f"rank {r} is gone" for r in ranks)


def _from_exchange(error: Exception) -> bool:
    """Whether an error may come from talking to another process rather than from this one's own work."""
    text = str(error).lower()
    words = ("connection", "gloo", "nccl", "peer", "socket", "timed out", "timeout", "watchdog", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
