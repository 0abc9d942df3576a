"""What the data commands leave behind: files where they were asked for, and no secrets anywhere."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from data_pipelines import ranges
from data_pipelines.cache import cache
from data_pipelines.index import index_name
from data_pipelines.loader import DataConfig, open_loader
from data_pipelines.pack import write_shards
from mmdiff.batch import Layout
from mmdiff.cli import app
from mmdiff.config import parse
from mmdiff.errors import MmdiffError
from tests.helpers.audit import watch
from tests.helpers.range_server import Server

SECRET = "s3cr3t-token-0123"


def png(color: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (color, 10, 10)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.png").write_bytes(png(40 * i))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(ranges, "PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "*")
    running = Server(tmp_path / "served")
    yield running
    running.close()


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, words)))
    return result.exit_code, result.output


def test_r28_data_commands_write_where_they_are_told_and_nowhere_else(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with watch() as seen:
        assert run("data", "pack", images, "--out", out)[0] == 0
        assert run("data", "tokenizer", out, "--vocab-size", 300, "--out", out / "tokenizer")[0] == 0
    assert seen.outside(out) == []
    for index in out.glob("*.idx.json"):
        index.unlink()
    with watch() as seen:
        assert run("data", "lint", out)[0] == 0
        assert run("data", "stats", out)[0] == 0
        assert run("data", "pack", images, "--out", out)[0] == 2
    assert seen.outside() == []
    with watch() as seen:
        assert run("data", "index", out)[0] == 0
    assert {p.name.partition(".tmp")[0] for p in seen.written} == {"shard-00000.tar.idx.json"}


def test_r28_a_dry_run_writes_nothing(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("data", "pack", images, "--out", out)[0] == 0
    recipe = {
        "model": {"type": "vq", "image_size": 8, "stem": 1, "widths": [8, 8], "blocks": 0, "levels": [3, 3]},
        "data": {"sources": [{"shards": [str(out)], "tasks": [{"type": "image"}]}], "batch_size": 2},
        "objective": {"type": "autoencoding"},
        "train": {"samples": 4},
        "device": "cpu",
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with watch() as seen:
        code, text = run("train", tmp_path / "recipe.yaml", "--dry-run")
    assert code == 0, text
    # PyTorch makes its own cache folder when a part of it is imported for the first time.
    assert [p for p in seen.outside() if not p.name.startswith("torchinductor_")] == []
    assert not (tmp_path / "run").exists()


def test_r29_tokens_in_addresses_and_the_environment_never_come_out(
    images: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GOOGLE_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    rows = ((f"k{i}", {"png": b"junk" if i == 2 else png(i), "txt": b"a thing"}) for i in range(6))
    (shard,) = write_shards(rows, tmp_path / "served", "s")
    Path(index_name(shard)).unlink()
    url = f"{server.url}/s-00000.tar?token={SECRET}"
    said = []
    for words in (["lint", url], ["stats", url], ["lint", f"{url}-gone.tar".replace("00000", "9")], ["index", url]):
        said.append(run("data", *words)[1])
    server.faults[:] = ["403"]
    said.append(run("data", "lint", url)[1])
    server.faults[:] = ["500"] * 5
    said.append(run("data", "stats", url)[1])
    named = url.replace("http://", f"http://user:{SECRET}@")
    said.append(run("data", "lint", named)[1])
    options = {"sources": [{"shards": [url], "tasks": [{"type": "image"}]}], "batch_size": 6, "max_skip_fraction": 1}
    skips: list[object] = []
    loader = open_loader(parse(DataConfig, options, "x"), None, Layout(image_size=8), seed=0, on_skip=skips.append)
    batches = iter(loader)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    with pytest.raises(MmdiffError) as caught:
        cache(url, tmp_path / "cached", lambda x: x[:, 0, ::4, ::4].long() + 2, 8, 2, "id")
    cache(url, tmp_path / "cached", lambda x: x[:, 0, ::4, ::4].long() + 2, 8, 2, "id", max_skip_fraction=1)
    said += [str(caught.value), caplog.text, repr(skips), loader.skip_report()]
    said += [p.read_text("latin1") for p in (tmp_path / "cached").iterdir()]
    assert len(skips) >= 1
    assert any("s-00000.tar" in text for text in said)
    assert not [text for text in said if SECRET in text]
