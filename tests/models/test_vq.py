"""The image tokenizer and the scorer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdiff import rng
from mmdiff.errors import ConfigError
from mmdiff.models.scorer import Config as ScorerConfig
from mmdiff.models.scorer import Scorer
from mmdiff.models.vq import VQ, Config, FiniteScalar

TINY = Config(image_size=16, stem=2, widths=(8, 16), blocks=1, levels=(4, 3))


@given(st.lists(st.integers(2, 9), min_size=1, max_size=4))
def test_every_code_survives_the_round_trip_through_its_values(levels: list[int]) -> None:
    quantizer = FiniteScalar(tuple(levels))
    codes = torch.arange(int(torch.tensor(levels).prod())).view(1, 1, -1)
    values = quantizer.values(codes)
    assert values.abs().max() <= 1
    assert torch.equal(quantizer.codes(values), codes)
    # Values that were drawn, not looked up: the nearest code, and the last one of a channel beyond its end.
    nearby = values + 0.49 / (quantizer.steps.view(1, -1, 1, 1) // 2) * torch.where(values > 0, -1, 1)
    assert torch.equal(quantizer.codes(nearby), codes)
    assert quantizer.codes(values + 100).unique().tolist() == [len(codes.flatten()) - 1]
    assert quantizer.codes(values - 100).unique().tolist() == [0]


def test_codes_of_the_forward_pass_decode_to_its_values() -> None:
    quantizer = FiniteScalar((8, 5, 5, 5))
    z = torch.randn(2, 4, 3, 3, generator=rng.generator(0, "z")) * 5
    values, codes = quantizer(z)
    torch.testing.assert_close(quantizer.values(codes), values, atol=1e-6, rtol=0)
    assert 0 <= codes.min()
    assert codes.max() < 1000


def test_latents_are_the_values_of_the_codes_and_decode_alike() -> None:
    model = VQ(TINY, generator=rng.generator(0, "init")).eval()
    pixels = torch.rand(2, 3, 16, 16, generator=rng.generator(1, "pixels")) * 2 - 1
    latents, codes = model.latents(pixels), model.encode(pixels)
    assert latents.shape[1] == TINY.channels == 2
    torch.testing.assert_close(latents, model.quantizer.values(codes))
    torch.testing.assert_close(model.decode(latents), model.decode(codes))


def test_gradients_pass_straight_through_the_rounding() -> None:
    z = torch.zeros(1, 2, 1, 1, requires_grad=True)
    FiniteScalar((5, 5))(z)[0].sum().backward()
    assert z.grad is not None
    assert (z.grad > 0.5).all()


def test_decoding_codes_equals_the_reconstruction() -> None:
    model = VQ(TINY, generator=rng.generator(0, "init")).eval()
    pixels = torch.rand(2, 3, 16, 16, generator=rng.generator(1, "pixels")) * 2 - 1
    with torch.no_grad():
        output, codes = model(pixels)
    assert codes.shape == (2, 4, 4)
    assert torch.equal(codes, model.encode(pixels))
    torch.testing.assert_close(model.decode(codes), output.clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_read_and_draw(dtype: torch.dtype) -> None:
    config = Config(image_size=16, stem=1, widths=(8, 8), blocks=0, levels=(8, 5, 5, 5))
    model = VQ(config, generator=rng.generator(0, "init")).eval()
    pixels = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact, drawn = model.encode(pixels), model.decode(model.encode(pixels))
    half = model.to(dtype)
    values, codes = half.quantizer(half.encoder(pixels.to(dtype)))
    assert torch.equal(half.quantizer.codes(values.float()), codes), "a code's number must not be rounded"
    assert (half.encode(pixels) == exact).float().mean() > 0.8
    assert half.decode(exact).dtype == torch.float32
    assert (half.decode(exact) - drawn).abs().mean() < 0.01


def test_foreign_codes_and_sizes_are_refused() -> None:
    model = VQ(TINY)
    with pytest.raises(ConfigError, match=r"outside 0 \.\. 11"):
        model.decode(torch.tensor([[[12]]]))
    with pytest.raises(ConfigError, match=r"\(16, 16\)"):
        model.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises((ConfigError, ValueError), match="multiple of the downsampling"):
        Config(image_size=18, widths=(8, 16, 16))


def test_scorer_ignores_text_padding_and_returns_unit_vectors() -> None:
    scorer = Scorer(
        ScorerConfig(vocab_size=20, image_size=16, widths=(8, 16), width=12), generator=rng.generator(0, "init")
    )
    ids = torch.tensor([[4, 5, 0, 0]])
    short = scorer.embed_text(ids[:, :2], torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(scorer.embed_text(ids, torch.tensor([[True, True, False, False]])), short)
    vectors = scorer.embed_image(torch.rand(3, 3, 16, 16, generator=rng.generator(0, "pixels")))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
