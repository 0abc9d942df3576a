"""A published MMaDA folder through the public interface: text, pictures to text, text to pictures, redrawing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mmdiff
from mmdiff.commands.info import describe
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.io.convert import convert
from tests.helpers import mmada
from tests.helpers.tiny import picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mmada.publish(tmp_path_factory.mktemp("mmada"))


@pytest.fixture(scope="module")
def model(folder):
    return mmdiff.load(folder, device="cpu")


def test_a_published_folder_can_do_everything(model):
    assert model.capabilities == {"ask", "caption", "chat", "generate_text", "infill", "text_image"}


def test_without_an_image_tokenizer_text_is_left(folder, tmp_path):
    bare = mmada.publish(tmp_path / "bare", image_tokenizer=False)
    assert mmdiff.load(bare, device="cpu").capabilities == {"chat", "generate_text", "infill"}
    with pytest.raises(CheckpointError, match="image_tokenizer="):
        mmdiff.load(bare, device="cpu").vision.caption(picture(0))
    given = mmdiff.ImageGenerator.from_pretrained(bare, image_tokenizer=folder / "image_tokenizer", device="cpu")
    assert given(prompts="a cat", seeds=0).images[0].size == (16, 16)


def test_it_answers_about_what_it_sees(model):
    pictures = [picture(n) for n in range(4)]
    answers = model.vision.ask(pictures, "how many dogs are there?", gen_length=8)
    assert len(answers) == 4
    assert len(set(answers)) > 1
    assert model.vision.ask(pictures[2], "how many dogs are there?", gen_length=8) == answers[2]
    assert isinstance(model.vision.caption(pictures[0], gen_length=8), str)


def test_several_pictures_and_text_alone_are_read_too(model):
    one, two = picture(0), picture(1)
    both = model.vision.ask([[one, two]], "yes or no", gen_length=4)
    assert len(both) == 1
    chat = [{"role": "user", "content": [{"type": "image", "image": one}, {"type": "text", "text": "a cat"}]}]
    assert model.vision.chat(chat, gen_length=4) == model.vision.ask(one, "a cat", gen_length=4)
    assert isinstance(model.text.generate("a cat sat", gen_length=4), str)


def test_a_prompt_lies_as_published(model, folder):
    """Task, picture between its marks, conversation; the picture in the middle square of what was given."""
    from mmdiff.pipelines.prompts import Prompter, about

    tree = json.loads((folder / "config.json").read_text())
    ids = Prompter(model.checkpoint).conversation(about(picture(0), "a cat")).ids
    special, n = tree["reserved_token_mapping"], tree["num_vq_tokens"]
    assert ids[:2] == [special["<|mmu|>"], special["<|soi|>"]]
    assert ids[2 + n] == special["<|eoi|>"]
    assert ids[3 + n] == model.checkpoint.tokenizer.bos_id
    assert all(tree["code_offset"] <= i < tree["code_offset"] + tree["codebook_size"] for i in ids[2 : 2 + n])


def test_pictures_are_a_function_of_prompt_and_seed_whatever_is_beside_them(model):
    prompts = ["a red circle", "the blue square is small", "a cat", ""]
    together = model.images(prompts=prompts, seeds=[1, 2, 3, 4], output_type="latent").images
    assert together.shape == (4, 4, 4)
    assert 0 <= int(together.min()) <= int(together.max()) < 32
    for prompt, seed, codes in zip(prompts, [1, 2, 3, 4], together, strict=True):
        alone = model.images(prompts=prompt, seeds=seed, output_type="latent").images
        assert torch.equal(alone[0], codes)
    assert len({tuple(c.flatten().tolist()) for c in together}) == 4


def test_guidance_and_the_prompt_matter(model):
    plain, guided = (
        model.images(prompts="a cat", seeds=0, guidance=g, output_type="latent").images for g in (1.0, 6.0)
    )
    assert not torch.equal(plain, guided)
    other = model.images(prompts="a red circle", seeds=0, guidance=6.0, output_type="latent").images
    assert not torch.equal(other, guided)


def test_the_unguided_branch_is_that_of_the_empty_prompt(model):
    """Guidance 0 leaves the unconditional reading alone, which is the reading of the empty prompt."""
    free = model.images(prompts="a cat", seeds=0, guidance=0.0, output_type="latent").images
    empty = model.images(prompts="", seeds=0, guidance=1.0, output_type="latent").images
    assert torch.equal(free, empty)


def test_only_the_marked_part_is_drawn_again(model):
    image, mask = picture(3, 16, 16), np.zeros((16, 16), dtype=bool)
    mask[:4, :8] = True
    out = model.images.edit(image, mask, "a cat", seed=0)
    before, after = np.asarray(image), np.asarray(out)
    assert np.array_equal(before[~mask], after[~mask])
    assert not np.array_equal(before[mask], after[mask])


def test_steps_of_a_run_can_be_shown(model):
    assert model.images.denoising(prompts=["a cat"], seeds=[0], columns=3).size == (48, 16)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "pow2", "sigmoid"])
def test_every_schedule_draws_in_as_many_passes_as_asked(model, schedule):
    out = model.images(prompts="a cat", seeds=0, mask_schedule=schedule, num_inference_steps=4)
    assert out.trace.nfe == 4


@pytest.mark.parametrize(
    "words", [{"temperature": 0.0}, {"mask_schedule": "exp"}, {"preset": "best"}, {"order": "mar"}]
)
def test_words_that_mean_nothing_here_are_refused(model, words):
    with pytest.raises(ConfigError):
        model.images(prompts="a cat", seeds=0, **words)


def test_a_tokenizer_of_another_length_is_refused(folder, tmp_path):
    from mmdiff.text import Tokenizer
    from tests.helpers.tiny import TEXTS

    other = mmada.publish(tmp_path / "other")
    Tokenizer.train(TEXTS, 300).save_pretrained(other)
    with pytest.raises(CheckpointError, match="image codes begin at id"):
        mmdiff.load(other, device="cpu").images(prompts="a cat")


def test_an_image_tokenizer_of_another_codebook_is_refused(model):
    import dataclasses
    from types import SimpleNamespace

    from mmdiff.pipelines.scripts import script_of

    strange = dataclasses.replace(model.checkpoint, image_tokenizer=SimpleNamespace(codebook=8))
    with pytest.raises(CheckpointError, match="is not the one"):
        script_of(strange)


def test_conversion_keeps_every_key_and_what_it_can_do(folder, model, tmp_path):
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    first, last = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[k], last[k]) for k in first)
    ours = mmdiff.load(tmp_path / "ours", device="cpu")
    assert ours.capabilities == model.capabilities
    same = [m.images(prompts="a cat", seeds=0, output_type="latent").images for m in (model, ours)]
    assert torch.equal(*same)


def test_info_says_what_it_is(folder):
    report = describe(folder)
    assert report["family"] == "mmada"
    assert report["layout"] == "mmada"
    assert "text_image" in report["capabilities"]
    assert report["image_tokenizer"]["family"] == "magvit"


def test_our_layout_is_written_and_read(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = mmdiff.load(tmp_path, device="cpu")
    assert again.vision.caption(Image.new("RGB", (9, 7), "red"), gen_length=4) == model.vision.caption(
        Image.new("RGB", (9, 7), "red"), gen_length=4
    )
