"""A published Lumina-DiMOO folder through the public interface: drawing, redrawing, instructions, questions."""

from __future__ import annotations

import inspect
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mmdiff
from data_pipelines.cache import CACHE_FILE
from data_pipelines.pack import write_shards
from data_pipelines.reader import iter_samples
from mmdiff.cli import app
from mmdiff.commands import train
from mmdiff.errors import ConfigError
from mmdiff.images import crop_sizes, to_pixels, to_shape
from mmdiff.io.convert import convert
from mmdiff.io.layouts import LAYOUTS, detect
from mmdiff.models.amused import AmusedVQ
from mmdiff.models.lumina import Config
from mmdiff.pipelines.drawing import Job
from mmdiff.pipelines.painters import painter_of
from mmdiff.pipelines.prompts import Prompter, about
from mmdiff.sampling.guidance import without_condition
from mmdiff.text.lumina import EDIT
from tests.helpers import image_layouts, lumina, published
from tests.helpers.tiny import picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lumina.publish(tmp_path_factory.mktemp("lumina"))


@pytest.fixture(scope="module")
def model(folder):
    return mmdiff.load(folder, device="cpu")


def test_a_published_folder_can_do_everything(model):
    assert model.capabilities == {"ask", "caption", "chat", "edit", "generate_text", "infill", "text_image"}


def test_the_published_configuration_is_told_by_its_rows():
    tree = {**published.OLMO, "embedding_size": 134548, "vocab_size": 126464, "mask_token_id": 126336}
    assert detect(tree) == "lumina"
    assert LAYOUTS["lumina"].read(tree, {}).code_offset == Config().code_offset
    assert detect(published.OLMO) == "olmo"


def test_a_picture_lies_in_rows_between_its_marks(model, folder):
    tree = json.loads((folder / "config.json").read_text())
    special, offset = tree["special_ids"], tree["code_offset"]
    ids = Prompter(model.checkpoint).conversation(about(picture(0, 40, 20), "how many dogs are there?")).ids
    # The last of each: at this size they are spelt by the text as well.
    begin, end = (len(ids) - 1 - ids[::-1].index(special[n]) for n in ("boi", "eoi"))
    rows, row = [], []
    for i in ids[begin + 1 : end]:
        row.append(i)
        if i == special["newline"]:
            rows.append(row)
            row = []
    assert not row
    assert {len(r) for r in rows} == {len(rows[0])}
    assert len(rows[0]) - 1 > len(rows), "a wide picture stays wide"
    assert all(offset <= i < offset + 32 for r in rows for i in r[:-1])
    assert ids[-1] == special["boa"]


def test_pictures_are_a_function_of_prompt_and_seed_whatever_is_beside_them(model):
    prompts = ["a red circle", "the blue square is small", "a cat"]
    together = model.images(prompts=prompts, seeds=[1, 2, 3], num_inference_steps=6, output_type="latent").images
    assert together.shape == (3, 4, 4)
    for prompt, seed, codes in zip(prompts, [1, 2, 3], together, strict=True):
        alone = model.images(prompts=prompt, seeds=seed, num_inference_steps=6, output_type="latent").images
        assert torch.equal(alone[0], codes)


def test_the_cache_saves_slots_and_computing_everything_is_exact(model):
    words = {"prompts": "a cat", "seeds": 0, "num_inference_steps": 12, "output_type": "latent"}
    exact, cached = (model.images(preset=p, **words) for p in ("exact", "fast"))
    assert exact.trace.nfe == cached.trace.nfe
    spent = [sum(p.computed for p in out.trace.passes) for out in (exact, cached)]
    assert spent[1] < spent[0]


def test_breaks_are_no_codes_and_only_the_marked_part_is_drawn_again(model):
    image, mask = picture(3, 16, 16), np.zeros((16, 16), dtype=bool)
    mask[:4, :8] = True
    before, after = np.asarray(image), np.asarray(model.images.edit(image, mask, "a cat", seed=0))
    assert np.array_equal(before[~mask], after[~mask])
    assert not np.array_equal(before[mask], after[mask])


def test_an_instruction_redraws_the_picture_with_the_old_one_in_sight(model):
    one, other = (np.asarray(model.images.edit(picture(n, 16, 16), None, "a cat", seed=0)) for n in (0, 1))
    assert one.shape == (16, 16, 3)
    assert not np.array_equal(one, other)


def test_an_instruction_lies_as_published(model):
    """The editing sentence, the instruction, the old picture's rows behind it; guidance keeps the picture."""
    painter, tokenizer = painter_of(model.checkpoint), model.checkpoint.tokenizer
    special, size = model.checkpoint.model.config.special, painter.grid
    shape = torch.ones(1, size**2, dtype=torch.bool)
    job = Job(subjects=["make it red"], known=None, open=shape, sources=None, about=[picture(0, 16, 16)])
    canvas = painter.canvas(job)
    codes = (painter.encode(to_pixels(picture(0, 16, 16), painter.size)[None])[0] + painter.offset).view(size, size)
    rows = [i for row in codes.tolist() for i in (*row, special.newline)]

    def laid(user):
        words = [tokenizer.encode(s) for s in ("<system>", EDIT, "</system>", "<user>")]
        shown = [special.boi, *rows, special.eoi, *tokenizer.encode("</user>"), special.boa, special.boi]
        return [*(i for w in words for i in w), *user, *shown]

    assert canvas.tokens[0][canvas.valid[0]][: -size * (size + 1) - 2].tolist() == laid(tokenizer.encode("make it red"))
    bare = without_condition(canvas, 0)
    assert bare.tokens[0][bare.valid[0]][: -size * (size + 1) - 2].tolist() == laid([special.uncondition])


def test_the_command_follows_an_instruction(folder, tmp_path):
    picture(0, 16, 16).save(tmp_path / "old.png")
    out = tmp_path / "new.png"
    words = ["generate", folder, "make it red", "--image", tmp_path / "old.png", "--out", out, "--steps", "3"]
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    with Image.open(out) as made:
        assert made.size == (16, 16)


def test_codes_are_cached_in_the_size_that_the_network_draws(folder, tmp_path):
    """The tokenizer's own size is another, and its codes would be refused."""
    picture(0, 16, 16).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    write_shards([("a", {"png": data, "image2.png": data})], tmp_path / "in", "s")
    words = ["data", "cache", tmp_path / "in", "--encoder", folder / "image_tokenizer", "--out", tmp_path / "out"]
    words += ["--others", "--size"]
    refused = CliRunner().invoke(app, [str(w) for w in (*words, 18)])
    assert refused.exit_code == 2
    assert "not a multiple" in refused.output
    done = CliRunner().invoke(app, [str(w) for w in (*words, 16)])
    assert done.exit_code == 0, done.output
    (made,) = (s for s, _ in iter_samples(str(tmp_path / "out")) if s is not None)
    assert all(np.load(io.BytesIO(made.members[n])).shape == (4, 4) for n in ("codes.npy", "image2.codes.npy"))


def test_networks_that_follow_no_instructions_say_so(tmp_path):
    from tests.helpers import mmada
    from tests.helpers.tiny import unified_checkpoint

    for images in (
        mmdiff.load(mmada.publish(tmp_path), device="cpu").images,
        mmdiff.ImageGenerator(unified_checkpoint()),
    ):
        with pytest.raises(ConfigError, match="mask"):
            images.edit(picture(0), None, "a cat")


def test_it_answers_single_questions(model):
    answers = model.vision.ask([picture(n) for n in range(3)], "how many dogs are there?", gen_length=8)
    assert len(set(answers)) > 1
    several = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    with pytest.raises(ConfigError, match="single questions"):
        model.vision.chat(several)
    with pytest.raises(ConfigError, match="empty"):
        model.vision.chat([{"role": "user", "content": " "}])


def test_conversion_keeps_every_key(folder, tmp_path):
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    first, last = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[k], last[k]) for k in first)


def test_the_tokenizer_is_that_of_diffusers(tmp_path):
    from diffusers import VQModel

    mine = AmusedVQ.from_pretrained(lumina.publish_amused(tmp_path / "vq"))
    names = inspect.signature(VQModel).parameters
    theirs = VQModel(**{k: tuple(v) if isinstance(v, list) else v for k, v in lumina.AMUSED.items() if k in names})
    theirs.load_state_dict(load_file(tmp_path / "vq" / "model.safetensors"))
    pixels = torch.rand(2, 3, 16, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = theirs.encode((pixels + 1) / 2).latents
        codes = theirs.quantize(latents)[2][2].view(2, 4, 2)
        drawn = theirs.decode(codes, force_not_quantize=True, shape=(2, 4, 2, 4)).sample
    assert torch.equal(mine.encode(pixels), codes)
    torch.testing.assert_close((mine.decode(codes) + 1) / 2, drawn, atol=1e-5, rtol=0)


def test_pictures_take_the_trained_shape_nearest_to_their_own():
    sizes = crop_sizes(16, 32)
    assert to_shape(picture(0, 400, 100), sizes).shape == (3, 64, 256)
    assert to_shape(picture(0, 90, 100), sizes).shape == (3, 128, 128)
    assert to_shape(picture(0, 50, 100), sizes).shape in ((3, 160, 96), (3, 160, 64), (3, 192, 64))


def test_it_is_trained_with_a_tokenizer_whose_own_size_is_another(folder, tmp_path):
    """Published tokenizers name 256 or 512 pixels, and the networks draw 512 or 1024."""
    images = folder / "image_tokenizer"
    picture(0, 16, 16).save(tmp_path / "a.png")
    members = {"png": (tmp_path / "a.png").read_bytes(), "json": json.dumps({"caption": "a cat"}).encode()}
    write_shards([(str(n), members) for n in range(4)], tmp_path / "in", "s")
    words = ["data", "cache", tmp_path / "in", "--encoder", images, "--size", 16, "--out", tmp_path / "codes"]
    assert CliRunner().invoke(app, [str(w) for w in words]).exit_code == 0
    recipe = {
        **{"init_from": str(folder), "tokenizer": str(folder), "image_tokenizer": str(images), "device": "cpu"},
        **{"objective": {"type": "masked"}, "out": str(tmp_path / "run"), "train": {"samples": 4}},
        "data": {
            "sources": [{"shards": [str(tmp_path / "codes")], "tasks": [{"type": "text_to_image"}]}],
            "batch_size": 2,
        },
    }
    assert np.isfinite(train.run(recipe, progress=False).fit.losses["text_to_image"])
    other = image_layouts.amused_shapes({**lumina.AMUSED, "num_vq_embeddings": 16})
    (tmp_path / "vq").mkdir()
    (tmp_path / "vq/config.json").write_text(json.dumps({**lumina.AMUSED, "num_vq_embeddings": 16}))
    save_file({k: torch.zeros(v) for k, v in other.items()}, tmp_path / "vq/model.safetensors")
    (tmp_path / "codes" / CACHE_FILE).unlink()  # it tells whose codes these are
    with pytest.raises(ConfigError, match="of 16 codes, the model draws"):
        train.run({**recipe, "image_tokenizer": str(tmp_path / "vq"), "out": str(tmp_path / "b")}, progress=False)
