"""The whole demo, a few samples long: every stage, the report, and continuing after an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mmdiff.commands.demo import evaluation, stages
from mmdiff.commands.demo.state import DemoState

SAMPLES = {"image_tokenizer": 24, "vision": 128, "reader": 64, "model": 64}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same stages on few samples and few questions."""
    monkeypatch.setattr(stages, "_planned", lambda state, name: SAMPLES[name])
    monkeypatch.setattr(evaluation, "QUESTIONS_PER_KIND", 2)
    monkeypatch.setattr(evaluation, "PROMPTS_PER_SPLIT", 12)
    monkeypatch.setattr(evaluation, "PICTURES_PER_PROMPT", 2)
    monkeypatch.setattr(evaluation, "CLASS_COLUMNS", 1)
    monkeypatch.setattr(evaluation, "SHOWN_PER_SPLIT", 4)
    monkeypatch.setattr(evaluation, "TONED_PER_SPLIT", 6)
    monkeypatch.setattr(evaluation, "UNTRAINED_CAPTIONS", 4)


class Images(HTMLParser):
    """Counts pictures and notes anything that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures, self.foreign = 0, []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        source = dict(attrs).get("src") or ""
        self.pictures += tag == "img"
        if tag in ("img", "script", "link") and not source.startswith("data:image/png;base64,"):
            self.foreign.append((tag, source))


def test_demo_runs_from_nothing_to_a_self_contained_report(short: None, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    report = stages.run_stages(DemoState.open(folder, seed=0, minutes=None, resume=False))
    page = Images()
    page.feed(report.read_text())
    assert page.pictures > 40
    assert not page.foreign
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert len(results["gates"]) == 7
    assert all("bound" in g and g["note"] for g in results["gates"])
    assert {row["set"] for row in results["distances"]} == {"model", "untrained", "real"}
    state = json.loads((folder / "demo.json").read_text())
    assert state["done"] == list(stages.TITLES)
    assert {p.name for p in (folder / "model" / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "classes.json",
        "generation_config.json",
        "image_tokenizer",
    }
    batch = 16
    drawn_at = {-(-round(SAMPLES["model"] * share) // batch) * batch for share in stages.PROGRESS_AT}
    assert {int(p.stem) for p in (folder / "progress").glob("*.png")} == drawn_at


def run_demo(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    code = (
        "from mmdiff.commands.demo import stages\n"
        "stages.TITLES = dict.fromkeys(['tokenizer', 'image_tokenizer'], 'x')\n"
        "stages._planned = lambda state, name: 1200\n"
        "import sys; from mmdiff.cli import main; sys.argv[0] = 'mmdiff'; main()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "demo", "--out", str(folder), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_an_interrupted_demo_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    weights = {}
    for name in ("whole", "cut"):
        folder = tmp_path / name
        process = run_demo(folder)
        if name == "cut":
            log = folder / "image_tokenizer" / "log.jsonl"
            while not log.exists() or '"samples"' not in log.read_text():
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 75
            assert b"--resume" in err
            process = run_demo(folder, "--resume")
        process.communicate(timeout=300)
        weights[name] = (folder / "image_tokenizer" / "model" / "model.safetensors").read_bytes()
    assert weights["whole"] == weights["cut"]
