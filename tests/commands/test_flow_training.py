"""From pictures to networks that draw by rectified flow: cache, training, sampling, scoring, on tiny networks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmdiff
from data_pipelines.pack import write_shards
from mmdiff import rng
from mmdiff.cli import app
from mmdiff.commands.train import train
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.images import encode_png
from mmdiff.models import scorer, vae, vq
from mmdiff.pipelines import ImageGenerator
from mmdiff.text import Tokenizer
from tests.commands.test_image_training import recipe
from tests.helpers import tiny

TEXTS = ["a red circle", "the blue square"]
MMDIT = {
    **{"type": "mmdit", "patch_size": 1, "width": 16, "depth": 2, "heads": 2, "max_grid": 8},
    **{"context_channels": 12, "pooled_channels": 12},
}
DIT = {
    **{"type": "dit", "patch_size": 1, "width": 16, "depth": 1, "heads": 2, "ffn_width": 32},
    **{"classes": 2, "learned_variance": False},
}
FLOW = {"type": "flow"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Twelve captioned pictures of two classes, a text encoder, and two autoencoders with the shards they encode."""
    folder = tmp_path_factory.mktemp("flow")
    pictures = (rng.uniform(rng.generator(0, "pictures"), (12, 16, 16, 3)) * 255).byte().numpy()
    rows = [
        (
            f"{i:03d}",
            {"png": encode_png(Image.fromarray(a)), "cls": str(i % 2).encode(), "txt": TEXTS[i % 2].encode()},
        )
        for i, a in enumerate(pictures)
    ]
    shards = write_shards(rows, folder / "shards", "pictures")[0]
    tokenizer = Tokenizer.train(tiny.TEXTS, 320)
    reads = scorer.Config(vocab_size=tokenizer.vocab_size, image_size=16, widths=(8, 8), width=12)
    scorer.Scorer(reads, generator=rng.generator(0)).save_pretrained(folder / "reads", tokenizer=tokenizer)
    codes = vq.Config(image_size=16, widths=(8, 8), blocks=0, levels=(5, 4))
    vq.VQ(codes, generator=rng.generator(1)).save_pretrained(folder / "vq")
    shape = {"image_size": 16, "width": 32, "multipliers": (1, 1), "blocks": 1, "channels": 2, "attention_levels": ()}
    vae.KLVAE(vae.Config(**shape), generator=rng.generator(2)).save_pretrained(folder / "vae")
    for name, extra in (("vq", ["--latents"]), ("vae", [])):
        words = ["data", "cache", str(shards), "--encoder", str(folder / name), "--out", str(folder / f"{name}_cached")]
        result = CliRunner().invoke(app, [*words, *extra])
        assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize(
    ("autoencoder", "task"),
    [
        ("vq", {"type": "prompted"}),
        ("vae", {"type": "prompted"}),
        (None, {"type": "prompted", "image": "pixels"}),
    ],
    ids=["scalar-quantised", "posterior", "pixels"],
)
def test_a_network_learns_to_draw_from_texts(tmp_path, parts, autoencoder, task):
    tokens = vq.VQ.from_pretrained(parts / "vq").grid if autoencoder == "vq" else 8
    size, channels = (8, 3) if autoencoder is None else (tokens, 2)
    model = {**MMDIT, "image_size": size, "channels": channels, "out_channels": channels}
    shards = parts / ("shards" if autoencoder is None else f"{autoencoder}_cached")
    beside = {"text_encoder": str(parts / "reads")}
    if autoencoder is not None:
        beside["image_tokenizer"] = str(parts / autoencoder)
    done = train(recipe(model, task, FLOW, shards, tmp_path / "run", **beside), progress=False)
    assert not done.fit.skipped
    assert done.fit.losses["image"] > 0
    loaded = mmdiff.load(done.model_dir, device="cpu")
    assert loaded.capabilities == {"text_image"}
    images = loaded.images
    drawn = images(prompts=TEXTS, seeds=[3, 4], num_inference_steps=2, output_type="np")
    side = 8 if autoencoder is None else 16
    assert drawn.images.shape == (2, side, side, 3)
    assert drawn.trace.nfe == 2
    assert drawn.trace.row_passes == 2 * 2 * 2  # two steps, two rows, with and without the prompt
    alone = images(prompts=TEXTS[1], seeds=4, num_inference_steps=2, output_type="np")
    assert np.array_equal(alone.images[0], drawn.images[1])
    loaded.save_pretrained(tmp_path / "copy")
    again = ImageGenerator.from_pretrained(tmp_path / "copy", device="cpu")
    assert np.array_equal(
        again(prompts=TEXTS[1], seeds=4, num_inference_steps=2, output_type="np").images, alone.images
    )
    assert images.denoising(prompts=TEXTS, num_inference_steps=3, columns=2).size == (2 * side, 2 * side)


@pytest.fixture(scope="module")
def drawing(parts, tmp_path_factory):
    """A text-to-image checkpoint whose prompts matter."""
    out = tmp_path_factory.mktemp("drawing")
    grid = vq.VQ.from_pretrained(parts / "vq").grid
    model = {**MMDIT, "image_size": grid, "channels": 2, "out_channels": 2}
    beside = {"text_encoder": str(parts / "reads"), "image_tokenizer": str(parts / "vq")}
    done = train(recipe(model, {"type": "prompted"}, FLOW, parts / "vq_cached", out, **beside), progress=False)
    loaded = mmdiff.load(done.model_dir, device="cpu")
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter += 0.2 * rng.normal(rng.generator(0, "louder"), parameter.shape)
    loaded.save_pretrained(out / "louder")
    return out / "louder"


def test_options_of_drawing_matter_and_wrong_ones_are_named(drawing):
    images = ImageGenerator.from_pretrained(drawing, device="cpu")

    def draw(**words):
        return images(prompts=[TEXTS[0]], seeds=[0], output_type="latent", **{"num_inference_steps": 4, **words}).images

    plain = draw()
    assert images.trace.nfe == 4
    for words in (
        {"guidance": 1.0},
        {"solver": "heun"},
        {"solver": "euler"},
        {"shift": 3.0},
        {"guidance_interval": [0.0, 0.5]},
    ):
        assert not torch.allclose(draw(**words), plain, atol=1e-4), words
    torch.testing.assert_close(draw(cfg_scale=3.5), plain)
    assert draw(num_inference_steps=1).shape == plain.shape
    other = images(prompts=[TEXTS[1]], seeds=[0], output_type="latent", num_inference_steps=4).images
    assert not torch.allclose(other, plain, atol=1e-4)
    for words, message in (
        ({"solver": "dpm"}, "solver 'dpm'; known: euler, heun, multistep"),
        ({"shift": 0.0}, "shift 0.0 must be above 0"),
        ({"guidance_interval": [0.5, 0.5]}, "must be two numbers with 0 <= low < high <= 1"),
        ({"preset": "best"}, "preset 'best'; known: exact, fast, turbo"),
        ({"temperature": 0.5}, "temperature means nothing to a network of this family"),
    ):
        with pytest.raises(ConfigError, match=message):
            draw(**words)


def test_a_part_is_redrawn_and_the_rest_stays(drawing):
    images = ImageGenerator.from_pretrained(drawing, device="cpu")
    before = images(prompts=TEXTS[0], seeds=0, num_inference_steps=3).images[0]
    mask = np.zeros((16, 16), dtype=bool)
    mask[:8] = True
    after = images.edit(before, mask, TEXTS[1], seed=5, num_inference_steps=3)
    assert np.array_equal(np.asarray(after)[8:], np.asarray(before)[8:])
    assert not np.array_equal(np.asarray(after)[:8], np.asarray(before)[:8])


def test_steps_are_reported(drawing):
    seen = []
    images = ImageGenerator.from_pretrained(drawing, device="cpu")
    images(
        prompts=TEXTS,
        num_inference_steps=3,
        callback_on_step_end=lambda pipeline, step, t, state: seen.append((step, t, state["tokens"].shape)),
    )
    assert [s for s, *_ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == sorted((t for _, t, _ in seen), reverse=True)
    assert seen[-1][1] == 0
    assert seen[0][2][:2] == (2, 2)


def test_commands_serve_and_score_it(drawing, tmp_path):
    def call(*words):
        result = CliRunner().invoke(app, [str(w) for w in words])
        assert result.exit_code == 0, result.output
        return result.output

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    call("sample", drawing, "--num", 3, "--out", tmp_path / "drawn", "--prompts", prompts, "--steps", 2)
    assert len(list((tmp_path / "drawn").glob("*/*.png"))) == 3
    call("generate", drawing, TEXTS[0], "--out", tmp_path / "one.png", "--steps", 2)
    with Image.open(tmp_path / "one.png") as one:
        assert one.size == (16, 16)
    found = tmp_path / "found.jsonl"
    found.write_text(json.dumps({"filename": "00000/samples/00000.png", "detections": []}))
    words = ("--limit", 1, "--samples", 1, "--steps", 2, "--out", tmp_path / "geneval", "--detections", found)
    assert "Total images: 1" in call("eval", "geneval", drawing, *words)
    told = json.loads(call("info", drawing, "--json"))
    assert told["capabilities"] == ["text_image"]


def test_a_class_conditional_network_learns_to_draw(tmp_path, parts):
    model = {**DIT, "image_size": 8, "channels": 2}
    beside = {"image_tokenizer": str(parts / "vae")}
    done = train(recipe(model, {"type": "latent"}, FLOW, parts / "vae_cached", tmp_path, **beside), progress=False)
    images = ImageGenerator.from_pretrained(done.model_dir, device="cpu")
    assert images.capabilities == {"class_image"}
    assert images.classes == 2
    drawn = images(labels=[0, 1], seeds=[0, 1], num_inference_steps=2, output_type="np").images
    assert drawn.shape == (2, 16, 16, 3)


def test_what_does_not_fit_is_said_before_training(tmp_path, parts):
    model = {**MMDIT, "image_size": 8, "channels": 2, "out_channels": 2}
    task, beside = {"type": "prompted"}, {"text_encoder": str(parts / "reads"), "image_tokenizer": str(parts / "vae")}
    cached = parts / "vae_cached"

    def refused(message, *, model=model, task=task, objective=FLOW, **changes):
        told = {k: v for k, v in {**beside, **changes}.items() if v is not None}
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(ConfigError, match=message):
            train(recipe(model, task, objective, cached, out, **told), progress=False)

    refused("gives 12, but the model's context_channels is 13", model={**model, "context_channels": 13})
    refused(
        r"has other latents than the model \(\d+ channels of \d+ x \d+\), which draws 3 channels",
        model={**model, "channels": 3, "out_channels": 3},
    )
    refused("the batch holds no classes; for texts name a text_encoder", text_encoder=None)
    refused("the model draws 2 channels, pixels have 3", task={"type": "prompted", "image": "pixels"})
    refused("objective masked reads no texts beside the network", objective={"type": "masked"})
    classes = {**DIT, "image_size": 8, "channels": 2}
    refused("this model draws nothing from texts", model=classes, text_encoder=None)


def test_a_checkpoint_without_its_parts_says_which(drawing, tmp_path, parts):
    import shutil

    shutil.copytree(drawing, tmp_path / "bare", ignore=shutil.ignore_patterns("manifest.json", "text_encoder"))
    with pytest.raises(CheckpointError, match="a network that reads features of prompts no text encoder"):
        ImageGenerator.from_pretrained(tmp_path / "bare", device="cpu")
    whole = ImageGenerator.from_pretrained(tmp_path / "bare", device="cpu", text_encoder=parts / "reads")
    assert whole.capabilities == {"text_image"}
