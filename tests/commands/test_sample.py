"""Many pictures: the same for any batch size, kept over interruptions, balanced, refused where they do not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmdiff import rng
from mmdiff.cli import app
from mmdiff.errors import ConfigError
from mmdiff.images import open_image
from mmdiff.models import llada, unified, vision, vq
from mmdiff.pipelines import Checkpoint, Pipeline, load
from mmdiff.text import Tokenizer
from tests.helpers import class_images

CLASSES = ("circle", "square", "cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random checkpoint on disk, saved and read through the public interface."""
    t = Tokenizer.train(["a red circle", "a cat", "square"], 300)
    language = llada.Config(
        vocab_size=t.vocab_size,
        width=32,
        depth=1,
        heads=2,
        kv_heads=2,
        ffn_width=64,
        mask_id=t.mask_id,
        bos_id=t.bos_id,
        eos_id=t.eos_id,
        eot_id=t.eot_id,
    )
    tower = vision.Config(image_size=16, patch_size=8, width=16, depth=1, heads=2, ffn_width=32)
    codes = vq.VQ(vq.Config(image_size=16, widths=(8, 8), blocks=0, levels=(5, 4)), generator=rng.generator(1))
    shape = unified.Config(
        language=language, vision=tower, codes=unified.CodesConfig(codebook=codes.codebook, grid=codes.grid)
    )
    model = unified.Unified(shape, generator=rng.generator(0))
    path = tmp_path_factory.mktemp("model")
    Pipeline(Checkpoint(model, t, codes, CLASSES, {"image": {"num_inference_steps": 4}})).save_pretrained(path)
    return path


def run(*arguments):
    result = CliRunner().invoke(app, ["sample", *map(str, arguments)])
    return result


def pictures(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.glob("*/*.png"))}


def test_a_saved_checkpoint_comes_back_with_all_its_parts(folder):
    back = load(folder, device="cpu").checkpoint
    assert back.classes == CLASSES
    assert back.defaults == {"image": {"num_inference_steps": 4}}
    assert "class_image" in back.capabilities
    assert "caption" in back.capabilities


def test_pictures_do_not_depend_on_the_batch_size(folder, tmp_path):
    for batch in (1, 4, 7):
        result = run(folder, "--num", 7, "--out", tmp_path / str(batch), "--batch", batch, "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == str(tmp_path / str(batch))
    one = pictures(tmp_path / "1")
    assert list(one) == [f"00000/{i:06d}.png" for i in range(7)]
    assert len(set(one.values())) == 7
    assert pictures(tmp_path / "4") == one
    assert pictures(tmp_path / "7") == one


def test_labels_are_balanced_and_go_into_the_npz_with_the_pictures(folder, tmp_path):
    result = run(folder, "--num", 6, "--out", tmp_path, "--labels", "0,2", "--npz", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["drawn"] == 6
    packed = np.load(tmp_path / "samples.npz", allow_pickle=False)
    assert packed["arr_1"].tolist() == [0, 2, 0, 2, 0, 2]
    first = np.asarray(Image.open(tmp_path / "00000" / "000003.png"))
    assert packed["arr_0"].dtype == np.uint8
    assert (packed["arr_0"][3] == first).all()
    drawn = load(folder, device="cpu").images(labels=2, seeds=3, output_type="np").images[0]
    assert (drawn == first).all()


def test_a_rerun_draws_only_what_is_missing_or_damaged(folder, tmp_path):
    base = [folder, "--num", 5, "--device", "cpu", "--json", "--out"]
    run(*base, tmp_path / "whole")
    expected = pictures(tmp_path / "whole")
    out = tmp_path / "holes"
    run(*base, out)
    inside = out / "00000"
    (inside / "000001.png").unlink()
    (inside / "000002.png").write_bytes(expected["00000/000002.png"][:60])
    Image.new("RGB", (8, 8)).save(inside / "000003.png")
    (inside / ".000004.png.tmp-999999999").write_bytes(b"half")
    result = run(*base, out)
    assert json.loads(result.stdout)["drawn"] == 3
    assert pictures(out) == expected
    assert not list(inside.glob(".*"))
    more = run(folder, "--num", 6, "--device", "cpu", "--json", "--out", out)
    assert json.loads(more.stdout)["drawn"] == 1
    assert json.loads((out / "manifest.json").read_text())["num"] == 6


def test_processes_share_the_work(folder, tmp_path, monkeypatch):
    run(folder, "--num", 5, "--out", tmp_path / "one", "--device", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, drawn in (("0", 3), ("1", 2)):
        monkeypatch.setenv("RANK", rank)
        result = run(folder, "--num", 5, "--out", tmp_path / "two", "--device", "cpu", "--json")
        assert json.loads(result.stdout)["drawn"] == drawn
    assert pictures(tmp_path / "two") == pictures(tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (["--seed0", "1"], "seed0"),
        (["--labels", "1"], "labels"),
        (["--guidance", "2"], "options"),
    ],
)
def test_a_folder_of_other_settings_is_refused(folder, tmp_path, change, word):
    run(folder, "--num", 2, "--out", tmp_path, "--device", "cpu")
    before = pictures(tmp_path)
    result = run(folder, "--num", 2, "--out", tmp_path, "--device", "cpu", *change)
    assert result.exit_code == 2
    assert word in result.stderr
    assert pictures(tmp_path) == before


@pytest.mark.parametrize("labels", ["3", "0-9", "x", "1-", "-1", ""])
def test_labels_that_are_none_are_refused(folder, tmp_path, labels):
    result = run(folder, "--num", 2, "--out", tmp_path / "out", "--device", "cpu", "--labels", labels)
    assert result.exit_code == 2
    assert "labels" in result.stderr


def test_prompts_are_drawn_in_turn(folder, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n\na cat\n")
    result = run(folder, "--num", 3, "--out", tmp_path / "out", "--device", "cpu", "--prompts", tmp_path / "p.txt")
    assert result.exit_code == 0, result.output
    gen = load(folder, device="cpu").images
    third = gen(prompts="a red circle", seeds=2, output_type="np").images[0]
    assert (np.asarray(Image.open(tmp_path / "out/00000/000002.png")) == third).all()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_a_stopped_run_goes_on_to_the_same_pictures(folder, tmp_path, number, code):
    command = [sys.executable, "-m", "mmdiff", "sample", str(folder), "--num", "400", "--batch", "2", "--device", "cpu"]
    command += ["--num-inference-steps", "8", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/00000/000003.png").exists():
        assert time.monotonic() < deadline, "nothing was drawn in a minute"
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(30) == code
    there = len(pictures(tmp_path / "out"))
    assert 4 <= there < 400
    num = there + 3
    options = ["--num", num, "--num-inference-steps", 8, "--device", "cpu", "--out"]
    result = run(folder, *options, tmp_path / "out", "--json")
    assert json.loads(result.stdout)["drawn"] == num - there
    run(folder, *options, tmp_path / "fresh")
    assert pictures(tmp_path / "out") == pictures(tmp_path / "fresh")
    assert not list((tmp_path / "out").glob("*/.*"))


@pytest.mark.parametrize("kind", ["emigm", "halton"])
def test_class_conditional_checkpoints_are_sampled_alike(tmp_path, kind):
    model = class_images.folder(kind, tmp_path / "model")
    words = ["--steps", 3, *(["--set", "head_steps=2"] if kind == "emigm" else [])]
    result = run(model, "--num", 5, "--out", tmp_path / "a", "--batch", 5, "--grid", tmp_path / "grid.png", *words)
    assert result.exit_code == 0, result.output
    assert run(model, "--num", 5, "--out", tmp_path / "b", "--batch", 2, "--shards", "--npz", *words).exit_code == 0
    for i in range(5):
        a, b = (np.asarray(open_image(tmp_path / n / f"00000/{i:06d}.png")).astype(int) for n in "ab")
        assert abs(a - b).max() <= 1
    assert list(np.load(tmp_path / "b" / "samples.npz")["arr_1"]) == [0, 1, 2, 0, 1]
    assert (tmp_path / "b" / "shards" / "sample-00000.tar").is_file()
    assert open_image(tmp_path / "grid.png").size == (8 * 3, 8 * 5)


def test_a_word_that_means_nothing_is_refused(tmp_path):
    model = class_images.folder("emigm", tmp_path / "model")
    result = run(model, "--num", 1, "--out", tmp_path / "a", "--set", "top_k=3")
    assert isinstance(result.exception, ConfigError) or result.exit_code == 2
    assert run(model, "--num", 1, "--out", tmp_path / "a", "--set", "order").exit_code != 0


def test_a_full_disk_says_what_to_do_and_keeps_what_is_drawn(folder, tmp_path):
    """The limit on the size of a file stands for the disk: pictures fit, samples.npz does not."""
    arguments = ["sample", str(folder), "--num", "5", "--out", str(tmp_path / "out"), "--npz", "--device", "cpu"]
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000));"
        "from mmdiff.cli import app; app(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "samples.npz: could not be written" in done.stderr
    assert "make room" in done.stderr
    assert "Traceback" not in done.stderr
    kept = pictures(tmp_path / "out")
    assert len(kept) == 5
    assert not list((tmp_path / "out").rglob(".*"))
    again = run(*arguments[1:], "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["drawn"] == 0
    assert pictures(tmp_path / "out") == kept
    assert (tmp_path / "out" / "samples.npz").exists()
