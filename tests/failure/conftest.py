"""Runs in forked children, for tests that kill them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Zygote:
    """Starts toy runs in forked children of one process that has imported torch already."""

    def __init__(self, errors: Path) -> None:
        self.errors, self._errors = errors, errors.open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/helpers/toy_training.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "OMP_NUM_THREADS": "1",
            },
        )

    def start(self, run_dir: Path, changes: dict | None = None, **env: str) -> int:
        """Start a run; its pid."""
        request = {"run_dir": str(run_dir), "env": env, "changes": changes or {}}
        return self._ask(json.dumps(request), "pid")[0]

    def start_ranks(self, run_dir: Path, ranks: int, changes: dict | None = None, env_of: Any = None) -> list[int]:
        """Start a run of several processes, with variables for some of them (rank -> variables); their pids."""
        changes = {"plain": True, **(changes or {})}
        request = {"run_dir": str(run_dir), "changes": changes, "ranks": ranks, "env_of": env_of or {}}
        return self._ask(json.dumps(request), "pid")

    def wait(self) -> int:
        """Return code of the run that was started last; negative: the signal that ended it."""
        return self.wait_ranks()[0]

    def wait_ranks(self) -> list[int]:
        """Return codes of its processes."""
        return self._ask("wait", "code")

    def run_ranks(self, run_dir: Path, ranks: int, changes: dict | None = None, env_of: Any = None) -> list[int]:
        """Start and wait."""
        self.start_ranks(run_dir, ranks, changes, env_of)
        return self.wait_ranks()

    def train(self, recipe: str, overrides: list[str], ranks: int) -> list[int]:
        """Carry out a recipe as ``mmdiff train`` does."""
        request = {"recipe": {"config": recipe, "overrides": overrides}, "ranks": ranks}
        self._ask(json.dumps(request), "pid")
        return self.wait_ranks()

    def said(self) -> str:
        """What runs wrote to stderr so far."""
        return self.errors.read_text()

    def _ask(self, request: str, kind: str) -> list[int]:
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()
        # Checked, because a number that is no pid must never reach os.kill: 0 and -1 mean many processes.
        line = self._process.stdout.readline()
        assert line.startswith(f"{kind} "), f"expected {kind}, got {line!r}: {self.errors.read_text()[-2000:]}"
        return [int(word) for word in line.split()[1:]]

    def run(self, run_dir: Path, changes: dict | None = None, **env: str) -> int:
        """Start and wait."""
        self.start(run_dir, changes, **env)
        return self.wait()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory) -> Iterator[Zygote]:
    server = Zygote(tmp_path_factory.mktemp("zygote") / "stderr")
    yield server
    server.close()


@pytest.fixture
def tmp_path(tmp_path) -> Iterator[Path]:
    """In memory where that is possible: a killed process leaves the same there, and fsyncs cost nothing."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="mmdiff-test-") as folder:
        yield Path(folder)
