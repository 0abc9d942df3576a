"""Names, keys, labels and values that look like shell commands: they are text, and no process is ever started."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from data_pipelines.loader import DataConfig, open_loader
from mmdiff import config
from mmdiff.batch import Layout
from mmdiff.cli import app
from mmdiff.commands.recipe import RunConfig
from mmdiff.errors import ConfigError, ShardError
from mmdiff.text import Tokenizer
from tests.helpers.audit import watch


def commands(sentinel: Path) -> list[str]:
    """Spellings that some shell would run."""
    do = f"touch {sentinel}".replace("/", "${IFS}")
    return [f"pipe:{do}", f"a;{do};b", f"$({do})", f"`{do}`", f"|{do}", f"a && {do}", f"${{HOME}}\n{do}"]


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(out, "PNG")
    return out.getvalue()


def hostile_folder(root: Path, words: list[str]) -> Path:
    """Class folders and pictures named like commands, with captions that are some."""
    for number, word in enumerate(words):
        folder = root / word.replace("/", "_")
        folder.mkdir(parents=True)
        (folder / f"{number} {word}.png".replace("/", "_")).write_bytes(png())
    return root


def hostile_tar(path: Path, words: list[str]) -> Path:
    with tarfile.open(path, "w") as out:
        for word in words:
            for suffix, data in (("png", png()), ("json", json.dumps({"caption": word, "concept": word}).encode())):
                info = tarfile.TarInfo(f"{word}.{suffix}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return path


def run(*words: object) -> int:
    return CliRunner().invoke(app, ["data", *map(str, words)]).exit_code


def test_r11_nothing_in_data_or_configurations_starts_a_process(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    words = commands(sentinel)
    (tmp_path / "work").mkdir()
    folder = hostile_folder(tmp_path / "work" / "images", words)
    shard = hostile_tar(tmp_path / "work" / "hostile.tar", words)
    llava = tmp_path / "work" / "llava.json"
    turns = [{"from": "human", "value": f"<image>\n{words[2]}"}, {"from": "gpt", "value": words[3]}]
    llava.write_text(json.dumps([{"id": w, "conversations": turns} for w in words]))
    with watch() as seen:
        assert run("pack", folder, "--kind", "classes", "--out", tmp_path / "packed") == 0
        assert run("pack", llava, "--out", tmp_path / "talks") == 0
        assert run("pack", folder, "--out", tmp_path / "x", "--name", words[2]) == 2
        assert run("index", shard) == 0
        assert run("lint", shard, tmp_path / "packed") == 0
        assert run("stats", shard, tmp_path / "talks") == 0
        assert run("tokenizer", shard, "--vocab-size", 300, "--out", tmp_path / "tokenizer") == 0
        for word in words:
            assert run("lint", word) == 3
            assert run("build", word, "--out", tmp_path / "built") == 2
            with pytest.raises((ConfigError, ShardError)):
                config.load(RunConfig, {"out": word, "tokenizer": word, "data": {"sources": [{"shards": [word]}]}})
            with pytest.raises(ConfigError):
                config.load(DataConfig, {}, [f"batch_size={word}"])
        source = {"shards": [str(shard), str(tmp_path / "packed")], "tasks": [{"type": "caption"}]}
        options = config.parse(DataConfig, {"sources": [source], "batch_size": 4}, "test")
        tokenizer = Tokenizer.from_pretrained(tmp_path / "tokenizer")
        layout = Layout(vocab_size=tokenizer.vocab_size, features=4, image_size=8)
        batches = iter(open_loader(options, tokenizer, layout, seed=0))
        keys = {key for batch in itertools.islice(batches, 4) for key in batch.keys}
        batches.close()  # type: ignore[attr-defined]
    assert any("touch" in key for key in keys)
    assert seen.processes == []
    assert not sentinel.exists()


def test_the_record_sees_processes_and_files(tmp_path: Path) -> None:
    import subprocess
    import sys

    with watch() as seen:
        subprocess.run([sys.executable, "-c", ""], check=True)
        (tmp_path / "a").write_text("x")
        (tmp_path / "a").rename(tmp_path / "b")
    assert len(seen.processes) == 1
    assert {p.name for p in seen.written} >= {"a", "b"}
    assert seen.outside(tmp_path) == []
    assert set(seen.outside(tmp_path / "c")) == set(seen.written)
