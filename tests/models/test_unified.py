"""Vision, text and image codes on one canvas; the small model is the big one with other numbers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from mmdiff import rng
from mmdiff.batch import IMAGE
from mmdiff.errors import ConfigError
from mmdiff.images import Tiling
from mmdiff.models import llada, llada_v, unified, vision

LANGUAGE = llada.Config(
    vocab_size=37,
    width=32,
    depth=2,
    heads=4,
    kv_heads=4,
    ffn_width=48,
    max_length=64,
    mask_id=3,
    bos_id=0,
    eos_id=1,
    eot_id=2,
)
VISION = vision.Config(image_size=16, patch_size=8, width=24, depth=2, heads=2, ffn_width=32)
TINY = unified.Config(language=LANGUAGE, vision=VISION, codes=unified.CodesConfig(codebook=10, grid=2))


@pytest.fixture(scope="module")
def model() -> unified.Unified:
    return unified.Unified(TINY, generator=rng.generator(0, "init")).eval()


def pixels(n: int) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=rng.generator(n, "pixels")) * 2 - 1


@torch.no_grad()
def test_features_fill_their_slots_in_row_major_order(model: unified.Unified) -> None:
    slots = [IMAGE] * 4
    ids = torch.tensor([[5, *slots, 6, 7, 7, 7, 7], [8, *slots, *slots, 9]])
    images = pixels(3)
    embeds, features = model.embed_slots(ids, images), model.features(images)
    torch.testing.assert_close(embeds[0, 1:5], features[0])
    torch.testing.assert_close(embeds[1, 1:9], features[1:].flatten(0, 1))
    torch.testing.assert_close(embeds[0, 0], model.language.embed_tokens.weight[5])


@torch.no_grad()
def test_codes_carry_their_place_in_the_image(model: unified.Unified) -> None:
    v = LANGUAGE.vocab_size
    ids = torch.tensor([[5, v + 1, v + 1, v + 9, v + 10]])
    embeds = model.embed_slots(ids)
    table, places = model.codes.embedding.weight, model.codes.position.weight
    torch.testing.assert_close(embeds[0, 1:], table[[1, 1, 9, 10]] + places)


@torch.no_grad()
def test_one_placeholder_per_image_gives_the_same_embeddings(model: unified.Unified) -> None:
    images = pixels(2)
    wide = model.embed_slots(torch.tensor([[5, *[IMAGE] * 4, 6, *[IMAGE] * 4, 7]]), images)
    embeds, valid = model.embed(torch.tensor([[5, IMAGE, 6, IMAGE, 7], [5, 6, 6, 6, 7]]), list(images.split(1)))
    torch.testing.assert_close(embeds[:1], wide)
    assert valid.sum(1).tolist() == [11, 5]
    assert (embeds[1, 5:] == 0).all()


def test_wrong_number_of_images_is_refused(model: unified.Unified) -> None:
    with pytest.raises(ConfigError, match="4 image slots"):
        model.embed_slots(torch.tensor([[IMAGE] * 4]), pixels(2))
    with pytest.raises(ConfigError, match="1 image placeholders for 0 images"):
        model.embed(torch.tensor([[IMAGE, 1]]), [])


@torch.no_grad()
def test_heads_have_their_own_vocabularies(model: unified.Unified) -> None:
    hidden = model.hidden(embeds=model.embed_slots(torch.tensor([[1, 2]])))
    assert model.text_head(hidden).shape == (1, 2, 37)
    assert model.code_head(hidden).shape == (1, 2, 10)


def test_layout_tells_tasks_what_to_build(model: unified.Unified) -> None:
    layout = model.layout()
    assert (layout.features, layout.codes, layout.code_offset, layout.code_mask_id) == (4, 4, 37, 47)


def shape_of(module: torch.nn.Module) -> set[tuple[str, str]]:
    """(key with layer numbers removed, type) of every submodule."""
    return {(re.sub(r"\.\d+\.", ".N.", f"{name}."), type(part).__name__) for name, part in module.named_modules()}


def test_the_small_model_has_the_module_types_and_key_names_of_the_published_8b_model(model: unified.Unified) -> None:
    with torch.device("meta"):
        published = llada_v.LLaDAV(llada_v.Config())
    small = {(name, kind) for name, kind in shape_of(model) if not name.startswith("codes.") and name != "."}
    assert small == {entry for entry in shape_of(published) if entry[0] != "."}

    def keys(module: torch.nn.Module) -> set[str]:
        return {re.sub(r"\.\d+\.", ".N.", k) for k in module.state_dict() if not k.startswith("codes.")}

    assert keys(model) == keys(published)
    assert isinstance(model, llada_v.LLaDAV)
    assert isinstance(model.language, type(published.language))


SHARING = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(VISION, patch_size=4),
    codes=unified.CodesConfig(codebook=6, grid=2, levels=(2, 3)),
    pool=2,
)


@torch.no_grad()
def test_pooling_averages_squares_of_neighbouring_features() -> None:
    net = unified.Unified(SHARING, generator=rng.generator(0, "init")).eval()
    assert net.layout().features == 4
    images = pixels(2)
    squares = net.vision(images).view(2, 2, 2, 2, 2, -1).mean((2, 4))
    torch.testing.assert_close(net.features(images), net.connector(squares.flatten(1, 2)))


@torch.no_grad()
def test_codes_that_agree_in_a_channel_share_its_part() -> None:
    codes = unified.ImageCodes(SHARING.codes, 8).init_(rng.generator(0, "init"))
    codes.embedding.weight.zero_()
    codes.position.weight.zero_()
    # Codes are (first channel, second channel): 0 = (0, 0), 1 = (1, 0), 2 = (0, 1), 3 = (1, 1); 6 is the masked code.
    a, b, c, d = codes.embed(torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(b - a, d - c)
    assert not torch.allclose(a, b)
    assert not codes.embed(torch.tensor([6, 6, 6, 6])).any()
    logits = codes(torch.randn(5, 8, generator=rng.generator(1, "hidden")))
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], logits[:, 3] - logits[:, 2])
    codes.head.weight[3, 0] = 1.0  # what is one code's own comes on top
    changed = codes(torch.randn(5, 8, generator=rng.generator(1, "hidden")))
    assert torch.equal(changed[:, :3], logits[:, :3])
    assert not torch.allclose(changed[:, 3], logits[:, 3])


@torch.no_grad()
def test_a_model_that_pools_and_shares_survives_saving(tmp_path: Path) -> None:
    net = unified.Unified(SHARING, generator=rng.generator(0, "init")).eval()
    net.save_pretrained(tmp_path)
    loaded = unified.Unified.from_pretrained(tmp_path)
    hidden = torch.randn(3, LANGUAGE.width, generator=rng.generator(2, "hidden"))
    assert torch.equal(loaded.code_head(hidden), net.code_head(hidden))
    assert torch.equal(loaded.to(torch.bfloat16).codes.digits.float(), net.codes.digits)


def test_sizes_of_codes_and_pooling_are_checked() -> None:
    with pytest.raises(ConfigError, match="make 6 codes, not 7"):
        unified.CodesConfig(codebook=7, grid=2, levels=(2, 3))
    with pytest.raises(ConfigError, match="pool 3 does not divide"):
        dataclasses.replace(SHARING, pool=3)
    with pytest.raises(ConfigError, match="exclude each other"):
        dataclasses.replace(SHARING, tiling=Tiling())


@torch.no_grad()
def test_fresh_text_enters_beside_images_at_their_scale():
    """At the text model's own 1/sqrt(D) it is drowned, and the first updates of its readout are chance."""
    for width in (32, 128):
        language = LANGUAGE.with_width(width)
        config = llada_v.Config(language=language, vision=VISION, tiling=None)
        fresh = llada_v.LLaDAV(config, generator=rng.generator(0, "init"))
        text, image = fresh.language.embed_tokens.weight.std(), fresh.features(pixels(4)).std()
        assert 0.3 < float(text / image) < 3


def gridded() -> unified.Unified:
    config = dataclasses.replace(TINY, codes=unified.CodesConfig(codebook=10, grid=2, rotary="grid"))
    return unified.Unified(config, generator=rng.generator(0, "init")).eval()


def test_image_tokens_on_a_grid_count_rows_and_columns_from_where_the_image_begins() -> None:
    v = LANGUAGE.vocab_size
    ids = torch.tensor([[5, v, v + 1, v + 10, v + 3, 6, v, v, v, v]])
    places = gridded().places(ids)
    assert places[0, :, 0].tolist() == [0, 1, 1, 2, 2, 5, 6, 6, 7, 7]
    assert places[0, :, 1].tolist() == [0, 1, 2, 1, 2, 5, 6, 7, 6, 7]


@torch.no_grad()
def test_text_is_read_alike_with_either_kind_of_positions(model: unified.Unified) -> None:
    other, ids = gridded(), torch.tensor([[5, 6, 7, 8, 9]])
    assert other.state_dict().keys() == model.state_dict().keys()
    places = other.places(ids)
    assert places.shape == (1, 5, 2)
    torch.testing.assert_close(
        other.hidden(embeds=other.embed_slots(ids), positions=places), model.hidden(embeds=model.embed_slots(ids))
    )


@torch.no_grad()
def test_a_grid_is_drawn_alike_alone_and_in_a_batch_and_read_through_a_store() -> None:
    from mmdiff.sampling import CodeBackbone, Cosine, Dual, Multinomial, RandomTopK, decode, layout

    net = gridded()
    shape = net.layout()

    def draw(prompts: list[list[int]], seeds: list[int], cache: Dual | None = None) -> torch.Tensor:
        canvas = layout(prompts, [[None] * 4] * len(prompts), mask_id=shape.code_mask_id)
        parts = {"schedule": Cosine(3), "selector": RandomTopK(1.0), "sampler": Multinomial(1.0), "cache": cache}
        return decode(
            CodeBackbone(net), canvas=canvas, generators=[rng.generator(s, "image") for s in seeds], **parts
        ).tokens

    together = draw([[5, 6, 7], [8]], [0, 1])
    assert torch.equal(together[1:], draw([[8]], [1]))
    assert torch.equal(together, draw([[5, 6, 7], [8]], [0, 1], Dual(refresh=1)))
    assert not torch.equal(together[0], together[1])


def test_a_grid_learns_as_a_sequence_does() -> None:
    from mmdiff.batch import Example, collate
    from mmdiff.training.objective import Masked

    v, ids = LANGUAGE.vocab_size, torch.tensor([5, 6, 40, 41, 42, 43])
    row = Example(
        key="a", task="text_to_image", ids=ids, labels=torch.where(ids >= v, ids, -100), weights=(ids >= v).float(),
        droppable=ids < v,
    )  # fmt: skip
    losses = [
        Masked()(net, collate([row] * 4), rng.generator(0, "objective")).total
        for net in (gridded(), unified.Unified(TINY, generator=rng.generator(0, "init")))
    ]
    assert all(bool(loss.isfinite()) for loss in losses)
    assert losses[0].item() != losses[1].item()
