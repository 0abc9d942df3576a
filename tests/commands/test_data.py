"""`mmdiff data ...` from end to end on small folders."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_pipelines.reader import iter_samples
from mmdiff.cli import app
from mmdiff.images import decode, to_pixels
from mmdiff.models.vae import KLVAE
from mmdiff.models.vq import VQ
from mmdiff.rng import generator
from mmdiff.text import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six captioned images."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(stream, "PNG")
        (images / f"v1.{i}.png").write_bytes(stream.getvalue())
        (images / f"v1.{i}.txt").write_text(f"picture number {i}")
    return images


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def test_a_folder_becomes_shards_an_index_statistics_and_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    packed = json.loads(run("pack", folder, "--out", out, "--samples-per-shard", 4, "--json"))
    assert (packed["samples"], len(packed["shards"])) == (6, 2)
    assert "nothing to complain about" in run("lint", out)
    assert json.loads(run("stats", out, "--json"))["captions"] == 6
    assert sum(json.loads(run("index", out, "--force", "--json")).values()) == 6
    trained = json.loads(run("tokenizer", out, "--vocab-size", 300, "--out", tmp_path / "tok", "--json"))
    assert Tokenizer.from_pretrained(tmp_path / "tok").vocab_size == trained["vocab_size"] <= 300


def test_packing_twice_needs_a_word(folder: Path, tmp_path: Path) -> None:
    run("pack", folder, "--out", tmp_path / "s")
    assert "--overwrite" in run("pack", folder, "--out", tmp_path / "s", code=2)
    run("pack", folder, "--out", tmp_path / "s", "--overwrite")


def test_shards_are_resharded_split_and_searched_for_duplicates(folder: Path, tmp_path: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "v1.2.png").read_bytes())
    (folder / "copy.txt").write_text("the same")
    run("pack", folder, "--out", tmp_path / "s", "--samples-per-shard", 3, "--workers", 2)
    again = json.loads(run("reshard", tmp_path / "s", "--out", tmp_path / "r", "--samples-per-shard", 2, "--json"))
    assert (again["samples"], len(again["shards"]), again["resumed"]) == (7, 4, 0)
    report = json.loads(run("dedup", tmp_path / "r", "--out", tmp_path / "found.json", "--json"))
    assert len(report["exact"]) == 1
    assert json.loads((tmp_path / "found.json").read_text()) == report
    text = run("split", tmp_path / "s", "--out", tmp_path / "p", "--parts", "train=0.6,test=0.4")
    assert "1 groups share pictures, 0 unreadable" in text
    assert "across the given names: 0 groups" in run("dedup", tmp_path / "p" / "train", tmp_path / "p" / "test")
    for parts in ("train", "train=1,test=x", "a=0.5,a=0.5", "../a=0.5,b=0.5", "a=0.9,b=0.3"):
        assert "error: " in run("split", tmp_path / "s", "--out", tmp_path / "q", "--parts", parts, code=2)


def test_bad_samples_are_left_out_and_named_if_asked(folder: Path, tmp_path: Path) -> None:
    entries = [{"image": f"v1.{i}.png", "conversations": []} for i in range(8)]
    (folder / "d.json").write_text(json.dumps(entries))
    assert "v1.6.png: cannot be read" in run("pack", folder / "d.json", "--out", tmp_path / "s", code=3)
    text = run("pack", folder / "d.json", "--out", tmp_path / "t", "--skip-bad")
    assert "6 samples in 1 shard in" in text
    assert "2 samples left out (missing_file 2)" in text


def test_statistics_become_a_page_without_anything_from_outside(folder: Path, tmp_path: Path) -> None:
    (folder / "v1.0.txt").write_text("<script>alert(1)</script>")
    run("pack", folder, "--out", tmp_path / "s")
    run("tokenizer", tmp_path / "s", "--vocab-size", 300, "--out", tmp_path / "tok")
    run("stats", tmp_path / "s", "--page", tmp_path / "out" / "page.html", "--tokenizer", tmp_path / "tok")
    page = (tmp_path / "out" / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "Tokens of the captions" in page
    assert "<script" not in page


def test_lint_ends_with_three_where_something_is_wrong(folder: Path, tmp_path: Path) -> None:
    (folder / "v1.3.png").write_bytes(b"junk")
    run("pack", folder, "--out", tmp_path / "s")
    text = run("lint", tmp_path / "s", code=3)
    assert "undecodable_image (1)" in text
    assert "v1.3" in text
    assert json.loads(run("lint", tmp_path / "s", "--fast", "--json"))["findings"] == []


def test_codes_of_a_saved_image_tokenizer_are_cached(folder: Path, tmp_path: Path) -> None:
    config = VQ.Config(image_size=8, stem=1, widths=(8, 8), blocks=0, levels=(3, 3))
    model = VQ(config, generator=generator(0, "init")).eval()
    model.save_pretrained(tmp_path / "vq")
    run("pack", folder, "--out", tmp_path / "s")
    done = json.loads(run("cache", tmp_path / "s", "--encoder", tmp_path / "vq", "--out", tmp_path / "c", "--json"))
    assert (done["samples"], done["grid"], done["skipped"]) == (6, [4, 4], {})
    used: set[int] = set()
    for sample, _ in iter_samples(str(tmp_path / "c")):
        assert sample is not None
        pixels = to_pixels(decode(sample.image()), 8)[None]
        used |= set(model.encode(pixels).unique().tolist())
        assert torch.equal(
            torch.from_numpy(np.load(io.BytesIO(sample.members["codes.npy"]))), model.encode(pixels)[0].short()
        )
    assert (done["codes_used"], done["codebook"]) == (len(used), 9)


def cached_moments(folder: Path, root: Path, scale: float) -> dict[str, Any]:
    """Cache the moments of the folder's pictures, with an autoencoder of this scale and always the same weights."""
    config = KLVAE.Config(
        image_size=8, width=32, multipliers=(1,), blocks=1, channels=2, attention_levels=(), scale=scale
    )
    KLVAE(config, generator=generator(0, "init")).save_pretrained(root / f"vae{scale}")
    made = run("cache", root / "s", "--encoder", root / f"vae{scale}", "--out", root / f"c{scale}", "--json")
    return dict(json.loads(made))


def test_the_size_of_latents_is_told_and_what_scale_would_make_it_one(folder: Path, tmp_path: Path) -> None:
    run("pack", folder, "--out", tmp_path / "s")
    done = cached_moments(folder, tmp_path, 1.0)
    squares = []
    for sample, _ in iter_samples(str(tmp_path / "c1.0")):
        assert sample is not None
        mean, log_variance = np.split(np.load(io.BytesIO(sample.members["moments.npy"])).astype(np.float64), 2)
        squares.append(mean**2 + np.exp(log_variance))
    assert done["latent_size"] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-3)
    assert cached_moments(folder, tmp_path, 5.0)["latent_size"] == pytest.approx(5 * done["latent_size"], rel=1e-3)
    text = run("cache", tmp_path / "s", "--encoder", tmp_path / "vae5.0", "--out", tmp_path / "again")
    assert f"root mean square {5 * done['latent_size']:.3g}" in text
    factor = f"{0.2 / done['latent_size']:.3g}"
    assert f"multiply 'scale' in {tmp_path / 'vae5.0'}/config.json by {factor}, delete its manifest.json" in text
    # The advice, followed.
    config = tmp_path / "vae5.0" / "config.json"
    config.write_text(config.read_text().replace('"scale": 5.0', f'"scale": {5 * float(factor)}'))
    (tmp_path / "vae5.0" / "manifest.json").unlink()
    again = run("cache", tmp_path / "s", "--encoder", tmp_path / "vae5.0", "--out", tmp_path / "third", "--json")
    assert json.loads(again)["latent_size"] == pytest.approx(1, abs=0.01)


def test_latents_of_another_scale_are_those_of_another_encoder(folder: Path, tmp_path: Path) -> None:
    run("pack", folder, "--out", tmp_path / "s")
    for scale in (1.0, 2.0):
        cached_moments(folder, tmp_path, scale)
    ids = [json.loads((tmp_path / f"c{scale}" / "cache.json").read_text())["encoder"] for scale in (1.0, 2.0)]
    assert ids[0] != ids[1]


def test_errors_are_sentences_with_their_exit_code(tmp_path: Path) -> None:
    assert "error: " in run("stats", tmp_path, code=3)
    assert "shell command" in run("lint", "pipe:cat x.tar", code=3)
    assert "expected a folder" in run("pack", tmp_path / "nothing", "--out", tmp_path / "s", code=2)
