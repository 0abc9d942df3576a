"""caption, ask, chat and generate on a tiny random checkpoint: what goes to stdout, what is refused."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmdiff import rng
from mmdiff.cli import app
from mmdiff.models import llada, unified, vision, vq
from mmdiff.pipelines import Checkpoint, Pipeline, load
from mmdiff.text import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    t = Tokenizer.train(["a red circle", "a cat", "square"], 300)
    ids = {"mask_id": t.mask_id, "bos_id": t.bos_id, "eos_id": t.eos_id, "eot_id": t.eot_id}
    language = llada.Config(vocab_size=t.vocab_size, width=32, depth=1, heads=2, kv_heads=2, ffn_width=64, **ids)
    tower = vision.Config(image_size=16, patch_size=8, width=16, depth=1, heads=2, ffn_width=32)
    codes = vq.VQ(vq.Config(image_size=16, widths=(8, 8), blocks=0, levels=(5, 4)), generator=rng.generator(1))
    shape = unified.Config(
        language=language, vision=tower, codes=unified.CodesConfig(codebook=codes.codebook, grid=codes.grid)
    )
    path = tmp_path_factory.mktemp("model")
    model = unified.Unified(shape, generator=rng.generator(0))
    Pipeline(Checkpoint(model, t, codes, (), {"text": {"gen_length": 6}})).save_pretrained(path)
    return path


@pytest.fixture
def images(tmp_path):
    for i, color in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), color).save(tmp_path / f"{i}.png")
    return [tmp_path / "0.png", tmp_path / "1.png"]


def run(*arguments, **options):
    return CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"], **options)


def test_caption_prints_one_line_per_image_and_json_for_machines(folder, images):
    vlm = load(folder, device="cpu").vision
    expected = vlm.caption(images)
    rows = json.loads(run("caption", folder, *images, "--json").stdout)
    assert [r["caption"] for r in rows] == expected
    assert [r["image_id"] for r in rows] == ["0", "1"]
    plain = run("caption", folder, *images, "--batch", 1)
    assert plain.stdout.splitlines() == [f"{i}\t{c}" for i, c in zip(images, expected, strict=True)]
    single = run("caption", folder, images[0], "--preset", "exact")
    assert single.stdout.strip() == vlm.caption(images[0], preset="exact")
    assert "6 passes, 1.00 tokens per pass" in single.stderr


def test_ask_prints_the_answer(folder, images):
    expected = load(folder, device="cpu").vision.ask(images[0], "a cat?")
    assert run("ask", folder, images[0], "a cat?").stdout.strip() == expected
    assert json.loads(run("ask", folder, images[0], "a cat?", "--json").stdout)["answer"] == expected


def test_chat_answers_line_by_line_and_keeps_the_conversation(folder, images):
    vlm = load(folder, device="cpu").vision
    content = [{"type": "image", "image": images[0]}, {"type": "text", "text": "a cat"}]
    first = vlm.chat([{"role": "user", "content": content}])
    text = f"/image {images[0]}\na cat\n/image nowhere.png\n/reset\nsquare\n/quit\nnever\n"
    result = run("chat", folder, input=text)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [first, vlm.chat([{"role": "user", "content": "square"}])]
    assert "nowhere.png: no such file" in result.stderr


def test_generate_continues_texts_or_draws_into_a_folder(folder, tmp_path):
    pipeline = load(folder, device="cpu")
    result = run("generate", folder, "a cat", "square", "--json")
    assert [r["text"] for r in json.loads(result.stdout)] == pipeline.text.generate(["a cat", "square"])
    out = tmp_path / "drawn"
    result = run("generate", folder, "a cat", "square", "--out", out, "--steps", 3)
    assert result.stdout.splitlines() == [str(out / "0000.png"), str(out / "0001.png")]
    drawn = pipeline.images(prompts=["a cat", "square"], seeds=[0, 1], steps=3).images
    assert [Image.open(out / f"000{i}.png").tobytes() for i in range(2)] == [d.tobytes() for d in drawn]


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["generate", "{}", "a", "--threshold", "0.5", "--steps", "2"], 2, "contradict"),
        (["generate", "{}", "a", "b", "--out", "x.png"], 2, "one file"),
        (["generate", "{}", "a", "--out", "x", "--threshold", "0.5"], 2, "threshold"),
        (["ask", "{}", "missing.png", "what?"], 2, "missing.png"),
        (["sample", "{}", "--num", "2", "--out", "x"], 4, "class_image"),
        (["caption", "nowhere", "a.png"], 4, "nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_an_exit_code(folder, arguments, code, word):
    result = run(*[a.format(folder) for a in arguments])
    assert result.exit_code == code
    assert word in result.stderr
    assert "Traceback" not in result.stderr
