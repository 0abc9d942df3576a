"""Class-conditional pictures: continuous and discrete tokens through one interface."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.pipelines import ImageGenerator
from tests.helpers import class_images

LATENT = ("emigm", "mar")
WORDS = {
    "emigm": {"num_inference_steps": 4, "head_steps": 3},
    "mar": {"num_inference_steps": 4, "head_steps": 3},
    "bert": {"num_inference_steps": 4},
    "halton": {"num_inference_steps": 4},
}


@pytest.fixture(scope="module", params=class_images.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def generator(kind):
    return ImageGenerator(class_images.checkpoint(kind))


def draw(generator, kind, **words):
    return generator(output_type="np", **{**WORDS[kind], **words}).images


def test_an_image_does_not_depend_on_the_batch_or_its_order(generator, kind):
    labels, seeds = [0, 1, 2, 0, 1], [5, 6, 7, 8, 9]
    together = draw(generator, kind, labels=labels, seeds=seeds).astype(int)
    back = draw(generator, kind, labels=labels[::-1], seeds=seeds[::-1])[::-1].astype(int)
    alone = np.concatenate(
        [draw(generator, kind, labels=[n], seeds=[s]) for n, s in zip(labels, seeds, strict=True)]
    ).astype(int)
    assert abs(together - back).max() <= 1
    assert abs(together - alone).max() <= 1
    assert len(np.unique(together, axis=0)) == len(labels)


def test_guidance_and_labels_matter(generator, kind):
    one, other = (draw(generator, kind, labels=[n], seeds=[0]) for n in (0, 1))
    assert (one != other).any()
    assert (draw(generator, kind, labels=[0], seeds=[0], guidance=1.0) != one).any() or kind in LATENT


def test_names_and_numbers_of_classes_are_the_same(generator, kind):
    assert (draw(generator, kind, labels="bee", seeds=3) == draw(generator, kind, labels=1, seeds=3)).all()


def test_editing_keeps_what_is_not_marked(generator, kind):
    image = Image.fromarray(draw(generator, kind, labels=[2], seeds=[1])[0])
    mask = np.zeros((8, 8), dtype=bool)
    mask[:4] = True
    edited = np.asarray(generator.edit(image, mask, 0, seed=4, **WORDS[kind]))
    assert (edited[4:] == np.asarray(image)[4:]).all()
    assert (edited[:4] != np.asarray(image)[:4]).any()
    with pytest.raises(ConfigError, match="marks no part"):
        generator.edit(image, mask & False, 0)


def test_the_picture_of_the_steps_has_one_row_per_image_and_ends_with_it(generator, kind):
    strip = np.asarray(generator.denoising(labels=[0, 1], seeds=[0, 1], columns=3, **WORDS[kind]))
    assert strip.shape[:2] == (16, 24)
    last = draw(generator, kind, labels=[0, 1], seeds=[0, 1]).reshape(16, 8, 3).astype(int)
    assert abs(strip[:, 16:].astype(int) - last).max() <= 1
    assert (strip[:, :8] != strip[:, 16:]).any()


@pytest.mark.parametrize("order", ["random", "mar", "halton"])
def test_continuous_tokens_take_every_order_and_solver(order):
    generator = ImageGenerator(class_images.checkpoint("emigm"))
    for words in ({"solver": "dpm"}, {"solver": "ddpm", "temperature": 0.9}):
        out = draw(generator, "emigm", labels=[0, 1], seeds=[0, 1], order=order, **words)
        assert out.shape == (2, 8, 8, 3)
        assert generator.trace.nfe <= 4


@pytest.mark.parametrize("order", ["confidence", "halton", "random", "google"])
def test_discrete_tokens_take_every_order(order):
    generator = ImageGenerator(class_images.checkpoint("bert"))
    codes = generator(labels=[0, 1], seeds=[0, 1], order=order, output_type="latent", num_inference_steps=4).images
    assert codes.shape == (2, 4, 4)
    assert codes.min() >= 0
    assert codes.max() < 9


def test_the_reference_reveals_as_many_tokens_in_every_row():
    generator = ImageGenerator(class_images.checkpoint("emigm"))
    source = torch.Generator().manual_seed(0)
    generator(labels=[0, 1, 2], generator=source, compat="reference", num_inference_steps=6)
    assert (generator.trace.committed == generator.trace.committed[:, :1]).all()
    generator(labels=[0, 1, 2], seeds=[0, 1, 2], num_inference_steps=6)
    assert (generator.trace.committed != generator.trace.committed[:, :1]).any()
    with pytest.raises(ConfigError, match="one generator"):
        generator(labels=[0], seeds=[0], compat="reference")


def test_guidance_outside_its_interval_costs_nothing():
    generator = ImageGenerator(class_images.checkpoint("emigm"))
    generator(labels=[0], seeds=[0], num_inference_steps=5, guidance_interval=[0.1, 0.3])
    assert generator.trace.row_passes < 2 * generator.trace.nfe
    generator(labels=[0], seeds=[0], num_inference_steps=5, guidance_interval=[0.0, 1.0])
    assert generator.trace.row_passes == 2 * generator.trace.nfe


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"labels": [3]}, "number from 0 to 2"),
        ({"labels": [-1]}, "number from 0 to 2"),
        ({"labels": [True]}, "number from 0 to 2"),
        ({"labels": ["dog"]}, "not one of the checkpoint's 3"),
        ({"labels": [0], "solver": "euler"}, "solver 'euler'; known: dpm, ddpm"),
        ({"labels": [0], "order": "spiral"}, "order 'spiral'"),
        ({"labels": [0], "temperature": 0.5}, "take ddpm"),
        ({"labels": [0], "guidance_interval": [0.5, 0.2]}, "guidance interval"),
        ({"labels": [0], "guidance_schedule": "square"}, "guidance_schedule 'square'"),
        ({"labels": [0], "order_temperature": 1.0}, "order_temperature means nothing"),
        ({"labels": [0], "mask_schedule": "sqrt"}, "mask_schedule 'sqrt'"),
        ({"labels": [0], "num_inference_steps": 0}, "at least 1"),
        ({"labels": [0], "head_steps": 0}, "head_steps 0 must be at least 1"),
        ({"labels": [0], "head_steps": 2.5}, "option head_steps = 2.5: expected a whole number"),
        ({"labels": [0], "temperature": "hot"}, "option temperature = 'hot': expected a number"),
        ({"labels": [0], "guidance_interval": 0.3}, "option guidance_interval = 0.3: expected a list of numbers"),
        ({"labels": [0], "guidance_interval": [0.1, 0.2, 0.3]}, r"\[0.1, 0.2, 0.3\] must be two numbers"),
        ({"labels": [0], "order": 3}, "option order = 3: expected a word"),
        ({"labels": [0], "seeds": ["a"]}, "seed 'a': expected a whole number"),
    ],
)
def test_bad_words_are_refused(words, message):
    generator = ImageGenerator(class_images.checkpoint("emigm"))
    with pytest.raises(ConfigError, match=message):
        generator(**{"seeds": [0], **words})


@pytest.mark.parametrize(
    ("words", "message"),
    [({"top_k": 0}, "top_k 0 must be at least 1"), ({"order_temperature": -1.0}, "must not be negative")],
)
def test_bad_words_of_discrete_tokens_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        ImageGenerator(class_images.checkpoint("bert"))(labels=[0], seeds=[0], **words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([4])}, "labels from 4 to 4; this network takes 0 to 3"),
        ({"labels": torch.tensor([-1])}, "labels from -1 to -1"),
        ({"mask": torch.ones(1, 15, dtype=torch.bool)}, r"mask is torch.bool \(1, 15\); expected bool \(1, 16\)"),
        ({"latents": torch.zeros(1, 16, 5)}, r"latents are \(1, 16, 5\); this network takes"),
    ],
)
def test_a_network_of_continuous_tokens_refuses_what_does_not_fit(change, message):
    net = class_images.checkpoint("emigm").model
    n, c = net.config.tokens, net.config.token_channels
    given = {"latents": torch.zeros(1, n, c), "mask": torch.ones(1, n, dtype=torch.bool), "labels": torch.tensor([0])}
    with pytest.raises(ConfigError, match=message):
        net.condition(**(given | change))


def test_a_network_of_codes_refuses_what_it_has_no_row_for():
    net = class_images.checkpoint("bert").model
    codes = torch.zeros(1, net.config.tokens, dtype=torch.long)
    with pytest.raises(ConfigError, match="codes from 0 to 10; this network takes 0 to 9"):
        net(codes.index_fill(1, torch.tensor([2]), 10), torch.tensor([0]))
    with pytest.raises(ConfigError, match="labels from 9 to 9; this network takes 0 to 3"):
        net(codes, torch.tensor([9]))


def test_texts_are_refused_by_a_network_of_classes():
    with pytest.raises(CheckpointError, match="text_image"):
        ImageGenerator(class_images.checkpoint("emigm"))(prompts=["a cat"])


@pytest.mark.parametrize(("kind", "other"), [("emigm", "bert"), ("bert", "emigm")])
def test_the_image_tokenizer_of_another_network_is_refused(kind, other):
    wrong = dataclasses.replace(
        class_images.checkpoint(kind), image_tokenizer=class_images.checkpoint(other).image_tokenizer
    )
    with pytest.raises(CheckpointError, match="give the one the network was trained with"):
        ImageGenerator(wrong)


def test_a_checkpoint_without_its_autoencoder_says_how_to_give_one(tmp_path):
    made = class_images.checkpoint("emigm")
    made.model.save_pretrained(tmp_path / "model")
    made.image_tokenizer.save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="image_tokenizer="):
        ImageGenerator.from_pretrained(tmp_path / "model")
    generator = ImageGenerator.from_pretrained(tmp_path / "model", device="cpu", image_tokenizer=tmp_path / "vae")
    assert len(generator(labels=[0], seeds=[0], num_inference_steps=2).images) == 1
