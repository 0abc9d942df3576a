"""The model that ships with the package: what is in it, and that it works at once."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mmdiff
from data_pipelines.reader import iter_samples
from mmdiff.cli import app
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.images import decode, encode_png
from mmdiff.io import hub
from mmdiff.io.atomic import verify_manifest
from mmdiff.io.checkpoint import read_tensors
from mmdiff.io.convert import convert
from mmdiff.io.folder import identify
from tests.helpers import mmada

NOTICE = hub.EMBEDDED.parent / "NOTICE.md"


@pytest.fixture(scope="module")
def model():
    return mmdiff.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def pictures():
    """Pictures that it has not seen, with their colour where it is asked for."""
    found = []
    for sample, _ in iter_samples(["embedded:emoji/novel_concepts"]):
        if sample is not None:
            asked = [qa for qa in sample.info().get("qa", []) if qa[2] == "color"]
            found += (
                [(decode(sample.members["webp" if "webp" in sample.members else "png"]), *asked[0][:2])]
                if asked
                else []
            )
    return found


def test_it_is_small_and_half_precision():
    files = [p for p in hub.EMBEDDED.parent.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 20e6
    for folder in (hub.EMBEDDED, hub.EMBEDDED / "image_tokenizer"):
        assert {i.dtype for i in read_tensors(folder).info.values()} == {torch.bfloat16}


def test_the_notice_names_the_files_that_are_there():
    named = dict(re.findall(r"`(tiny/\S+)` \| `([0-9a-f]{64})`", NOTICE.read_text(encoding="utf-8")))
    weights = {p.relative_to(NOTICE.parent).as_posix(): p for p in hub.EMBEDDED.rglob("*.safetensors")}
    assert named == {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in weights.items()}
    verify_manifest(hub.EMBEDDED)


def test_changed_bytes_are_refused(tmp_path, monkeypatch):
    shutil.copytree(hub.EMBEDDED, tmp_path / "tiny")
    weights = tmp_path / "tiny" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    monkeypatch.setattr(hub, "EMBEDDED", tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        mmdiff.load("tiny", device="cpu")


def test_a_missing_model_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "EMBEDDED", tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="reinstall"):
        mmdiff.load("tiny")


def test_an_existing_path_of_that_name_wins(tmp_path, monkeypatch):
    mmada.publish(tmp_path / "tiny", image_tokenizer=False)
    monkeypatch.chdir(tmp_path)
    assert mmdiff.load("tiny", device="cpu").checkpoint.model.config.type == "mmada"


def test_it_can_do_everything_and_computes_in_float32(model):
    assert model.capabilities == {
        "ask", "caption", "chat", "class_image", "edit", "generate_text", "infill", "text_image"
    }  # fmt: skip
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    assert {p.dtype for p in model.checkpoint.image_tokenizer.parameters()} == {torch.float32}


def test_a_shorter_answer_than_its_blocks_is_no_error(model, pictures):
    assert model.checkpoint.defaults["text"]["block_length"] == 8
    assert model.vision.caption(pictures[0][0], gen_length=4)
    with pytest.raises(ConfigError, match="block_length 8 must be between 1 and gen_length 4"):
        model.vision.caption(pictures[0][0], gen_length=4, block_length=8)


def test_it_changes_a_picture_by_an_instruction(model, pictures):
    """Another instruction, and another picture, must give another result."""
    (one, *_), (other, *_) = pictures[0], pictures[7]
    asked = [(one, "the same in noto style"), (one, "the same in firefox style"), (other, "the same in noto style")]
    drawn = [np.asarray(model.images.edit(p, None, text, seed=0)) for p, text in asked]
    assert drawn[0].shape == (64, 64, 3)
    assert (drawn[0] != drawn[1]).mean() > 0.1
    assert (drawn[0] != drawn[2]).mean() > 0.1


def test_it_names_colours_better_than_the_commonest_answer(model, pictures):
    images, questions, answers = zip(*pictures[:60], strict=True)
    said = model.vision.ask(list(images), list(questions))
    right = sum(s == a for s, a in zip(said, answers, strict=True)) / len(answers)
    commonest = max(answers.count(a) for a in set(answers)) / len(answers)
    assert right > commonest + 0.1
    shifted = [*images[7:], *images[:7]]
    blind = sum(s == a for s, a in zip(model.vision.ask(shifted, list(questions)), answers, strict=True)) / len(answers)
    assert right > blind + 0.2, "another picture must give another answer"


def test_it_draws_another_picture_for_another_prompt(model):
    one, other = model.images(prompts=["red heart", "green leaf"], seeds=[0, 0], output_type="pt").images
    # Red is high and green low in a heart; the other way round in a leaf (both on white).
    redness = [float((p[0] - p[1]).mean()) for p in (one, other)]
    assert redness[0] > redness[1]


def test_commands_use_it_when_no_model_is_given(tmp_path, pictures):
    picture = tmp_path / "picture.png"
    picture.write_bytes(encode_png(pictures[0][0]))
    run = CliRunner()
    for words in (
        ["caption", str(picture)],
        ["ask", str(picture), "what color is it?"],
        ["generate", "a red heart", "--out", str(tmp_path / "heart.png"), "--steps", "2"],
        ["generate", "hello", "--gen-length", "4"],
        ["sample", "--num", "2", "--out", str(tmp_path / "drawn"), "--steps", "2"],
    ):
        done = run.invoke(app, [*words, "--device", "cpu"])
        assert done.exit_code == 0, done.output
    assert (tmp_path / "heart.png").is_file()
    named = run.invoke(app, ["caption", "tiny", str(picture), "--device", "cpu"])
    bare = run.invoke(app, ["caption", str(picture), "--device", "cpu"])
    assert named.stdout == bare.stdout


@pytest.mark.parametrize(
    "words", [["ask", "what?"], ["ask", "tiny", "a.png", "how", "many"], ["caption"], ["generate"]]
)
def test_too_few_or_too_many_words_are_a_mistake_in_the_command(words):
    assert CliRunner().invoke(app, words).exit_code == 2


def test_precision_is_changed_by_one_command(tmp_path):
    """How a better model is put in its place."""
    done = CliRunner().invoke(app, ["convert", "--dtype", "float32", str(hub.EMBEDDED), str(tmp_path / "wide")])
    assert done.exit_code == 0, done.output
    convert(tmp_path / "wide", tmp_path / "again", dtype=torch.bfloat16)
    assert identify(tmp_path / "again").config == identify(hub.EMBEDDED).config
    for name in ("model.safetensors", "image_tokenizer/model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (hub.EMBEDDED / name).read_bytes()
    verify_manifest(tmp_path / "again")


def test_precision_of_a_published_folder_keeps_its_layout(tmp_path):
    mmada.publish(tmp_path / "theirs")
    done = convert(tmp_path / "theirs", tmp_path / "half", dtype=torch.bfloat16)
    assert (done.source, done.target) == ("mmada", "mmada")
    model = mmdiff.load(tmp_path / "half", device="cpu")
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    first, last = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "half"))
    assert first == last
