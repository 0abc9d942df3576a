"""Pack, train and generate where the surroundings are strange: locale, home, umask, names, a clock that jumps."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

RUN = r"""
import itertools, json, os, sys, time

if os.environ.get("CLOCK_JUMPS"):
    real, jumps = time.time, itertools.cycle([0, -86_400, 3.2e7, -3.2e7])
    time.time = lambda: real() + next(jumps)
os.umask(int(os.environ.get("UMASK", "022"), 8))
from mmdiff.cli import main

for words in json.loads(os.environ["COMMANDS"]):
    sys.argv = ["mmdiff", *words]
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{words[:2]} ended with {end.code}")
"""

PLACES = {
    "plain": ({}, "work"),
    "no home": ({"HOME": None}, "work"),
    "a home that cannot be written": ({"HOME": "/proc/none"}, "work"),
    "the C locale": ({"LC_ALL": "C", "LANG": "C"}, "été 数据"),
    "a private umask": ({"UMASK": "077"}, "work"),
    "spaces, other letters and long names": ({}, f"a b/Ünïcode 目录/{'n' * 200}"),
    "a clock that jumps": ({"CLOCK_JUMPS": "1"}, "work"),
}


def pictures(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i in range(6):
        out = io.BytesIO()
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(out, "PNG")
        stem = f"{i}-ü" + "x" * 240  # with its suffix 255 bytes or nearly so
        (folder / f"{stem}.png").write_bytes(out.getvalue())
        (folder / f"{stem}.txt").write_text(f"picture {i} naïve 数", encoding="utf-8")
    return folder


def commands(root: Path) -> list[list[str]]:
    source, shards, tokenizer, out = (str(root / n) for n in ("pictures", "shards", "tokenizer", "run"))
    language = {"vocab_size": 320, "width": 16, "depth": 1, "heads": 2, "kv_heads": 2, "ffn_width": 16}
    ids = {"max_length": 128, "rope_theta": 10000.0, "eos_id": 0, "bos_id": 1, "mask_id": 2, "eot_id": 5}
    recipe = {
        "model": {"type": "llada", **language, **ids},
        "tokenizer": tokenizer,
        "data": {"sources": [{"shards": [shards], "tasks": [{"type": "text"}]}], "batch_size": 2},
        "objective": {"type": "masked"},
        "train": {"samples": 8, "checkpoint_every_samples": 4, "log_every_samples": 4},
        "device": "cpu",
        "out": out,
    }
    (root / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return [
        ["data", "pack", source, "--out", shards],
        ["data", "lint", shards],
        ["data", "stats", shards],
        ["data", "tokenizer", shards, "--vocab-size", "320", "--out", tokenizer],
        ["train", str(root / "recipe.yaml")],
        ["generate", f"{out}/model", "picture", "--gen-length", "8"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_r33_pack_train_and_generate_work_in_strange_surroundings(tmp_path: Path, repository: Path, place: str) -> None:
    changes, below = PLACES[place]
    root = tmp_path / below
    pictures(root / "pictures")
    env = {**os.environ, **changes, "COMMANDS": json.dumps(commands(root))}
    env = {k: v for k, v in env.items() if v is not None}
    done = subprocess.run([sys.executable, "-c", RUN], env=env, cwd=repository, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert (root / "run" / "model" / "config.json").is_file()
