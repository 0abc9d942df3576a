"""Evaluations that are killed and go on (R26), and distances whatever the order and the number of processes (R27)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.datasets import geneval_format, mmmu_format
from eval.sources import open_images
from eval.statistics import write_statistics
from mmdiff import rng
from mmdiff.images import encode_png
from mmdiff.models import scorer
from mmdiff.text import Tokenizer

SHARDS = "embedded:emoji/novel_concepts"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny scorer with its tokenizer: features and verdicts for commands that run on their own."""
    words = Tokenizer.train(["a red circle", "cat dog horse pizza"], 300)
    shape = scorer.Config(vocab_size=words.vocab_size, image_size=16, widths=(8, 8), width=8)
    path = tmp_path_factory.mktemp("judge") / "scorer"
    scorer.Scorer(shape, generator=rng.generator(0)).save_pretrained(path)
    words.save_pretrained(path)
    return path


def command(measure: str, folder: Path, checkpoint: Path, judge: Path) -> list[str]:
    """One of the harnesses at its smallest, a few items per pass."""
    model, limit = str(checkpoint), ["--limit", "12", "--device", "cpu"]
    if measure == "fid":
        words = [f"model:{model}", SHARDS, "--num", "24", "--features", f"scorer:{judge}", "--batch-size", "2"]
        return ["fid", *words, "--measures", "fid,kid,pr", "--device", "cpu"]
    if measure == "geneval":
        geneval_format.write_prompts(folder / "prompts.jsonl")
        words = ["--prompts", str(folder / "prompts.jsonl"), "--scorer", str(judge), "--samples", "2"]
        return ["geneval", model, *words, "--batch-size", "2", *limit]
    if measure == "mmmu":
        mmmu_format.build(folder / "questions", per_subject=2)
        return [
            "mmmu",
            model,
            str(folder / "questions"),
            "--gen-length",
            "4",
            "--block-length",
            "4",
            "--steps",
            "4",
            *limit,
        ]
    if measure == "nll":
        return ["nll", model, SHARDS, "--samples", "2", *limit]
    return [measure, f"model:{model}", SHARDS, "--batch-size", "2", *limit]


def start(words: list[str], out: Path, repository: Path) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "mmdiff", "eval", *words, "--out", str(out)]
    return subprocess.Popen(line, cwd=repository, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(words: list[str], out: Path, repository: Path) -> dict:
    running = start(words, out, repository)
    _, errors = running.communicate(timeout=300)
    assert running.returncode == 0, errors.decode()[-2000:]
    # Names of files begin with the folder, which is another in every run.
    return json.loads((out / "result.json").read_text().replace(str(out), "OUT"))


def kept(out: Path) -> list[Path]:
    """Pictures that were drawn, or one entry per answer."""
    answers = [path for path in sorted(out.glob("answers-*.jsonl")) for _ in path.read_bytes().splitlines()]
    return answers or sorted(p for p in out.rglob("*.png") if not p.name.startswith("."))


@pytest.mark.parametrize(
    "measure", ["fid", "nll", *(pytest.param(m, marks=pytest.mark.slow) for m in ("geneval", "mmmu", "caption", "vqa"))]
)
def test_r26_a_killed_run_goes_on_and_gives_the_same(
    measure: str, checkpoint: Path, judge: Path, tmp_path: Path, repository: Path
) -> None:
    words = command(measure, tmp_path, checkpoint, judge)
    whole = finish(words, tmp_path / "whole", repository)
    out, draw = tmp_path / "killed", random.Random(measure)
    for number in sorted(draw.sample(range(1, 12), 2)):
        running = start(words, out, repository)
        while running.poll() is None and len(kept(out)) < number:
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        assert running.returncode == -signal.SIGKILL
        assert not (out / "result.json").exists()
    before = {p: p.stat().st_mtime_ns for p in kept(out) if p.suffix == ".png"}
    if before:  # a picture that was cut off is no picture
        victim = min(before, key=lambda path: before[path])
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
        del before[victim]
    assert finish(words, out, repository) == whole
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert [p.read_bytes() for p in kept(out)] == [p.read_bytes() for p in kept(tmp_path / "whole")]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of real pictures."""
    folder = tmp_path_factory.mktemp("sets")
    pictures = open_images(SHARDS).take(61)
    for i in range(61):
        place = folder / ("a" if i < 29 else "b") / f"{i if i < 29 else i - 29:05d}.png"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(encode_png(pictures.read(i)))
    return folder


def test_r27_two_processes_under_torchrun_give_the_numbers_of_one(
    sets: Path, judge: Path, tmp_path: Path, repository: Path
) -> None:
    words = ["fid", str(sets / "a"), str(sets / "b"), "--features", f"scorer:{judge}", "--measures", "all", "--floor"]
    words += ["--draws", "5", "--batch-size", "4", "--device", "cpu"]
    alone = finish(words, tmp_path / "alone", repository)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mmdiff"]
    done = subprocess.run(
        [*launch, "--", "eval", *words, "--out", str(tmp_path / "two")],
        cwd=repository,
        env=ENVIRONMENT,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    for part in ("result", "items"):
        ours, wanted = leaves(two[part]), leaves(alone[part])
        assert ours.keys() == wanted.keys()
        for place, value in wanted.items():
            close = pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
            assert ours[place] == close, place


def leaves(tree: object, place: str = "") -> dict[str, object]:
    """Every value of a tree by its place."""
    if not isinstance(tree, (dict, list)):
        return {place: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, value in pairs for k, v in leaves(value, f"{place}/{key}").items()}


def test_r27_a_folder_with_a_hole_or_a_broken_file_is_refused_by_the_command(
    sets: Path, judge: Path, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from eval.collect import collect
    from eval.features import open_network
    from mmdiff.cli import app

    network = open_network(f"scorer:{judge}")
    statistics = collect(open_images(sets / "b"), network).statistics
    reference = write_statistics(tmp_path / "b.npz", statistics)
    picture = (sets / "a" / "00000.png").read_bytes()
    for name, data, message in (
        ("00007.png", None, "00007"),
        ("00005.png", picture[:-40], "00005.png: cannot be decoded"),
        ("00009.png", encode_png(open_images(sets / "a").read(0)[:-1]), "00009.png"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in (sets / "a").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / name).unlink()
        if data is not None:
            (folder / name).write_bytes(data)
        done = CliRunner().invoke(app, ["eval", "fid", str(folder), str(reference), "--features", f"scorer:{judge}"])
        assert done.exit_code == 2
        assert message in done.output.replace("\n", "")
    words = ["eval", "fid", str(sets / "a"), str(reference), "--features", f"scorer:{judge}", "--sha256", "0" * 64]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "sha256" in done.output
