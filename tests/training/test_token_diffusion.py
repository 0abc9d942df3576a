"""eMIGM's objective and what a network starts from, where short runs may differ from the published recipe."""

from __future__ import annotations

import pytest
import torch

from mmdiff import rng
from mmdiff.config import parse
from mmdiff.errors import ConfigError
from mmdiff.models.diffusion_head import DiffusionHead
from mmdiff.models.emigm import EMIGM, Config, TransformerConfig
from mmdiff.training.token_diffusion import TokenDiffusion, denoising_losses, process

SIZE = TransformerConfig(width=24, depth=1, heads=2)
C, D = 4, 24


def draw(shape: tuple[int, ...], name: str) -> torch.Tensor:
    return rng.normal(rng.generator(0, name), shape)


@pytest.fixture(scope="module")
def head() -> DiffusionHead:
    made = DiffusionHead(C, D, 16, 1).init_(rng.generator(0, "head"))
    with torch.no_grad():  # it says nothing at the start
        made.final_layer.linear.weight.normal_(std=0.3, generator=rng.generator(1))
    return made


@pytest.mark.parametrize("cap", [3.0, 50.0])
def test_velocity_weights_the_noise_error_up_to_its_cap(head, cap):
    levels = torch.tensor([0, 300, 500, 700, 950, 999])
    clean, z, noise = draw((len(levels), C), "clean"), draw((len(levels), D), "z"), draw((len(levels), C), "noise")
    plain, weighted = (denoising_losses(head, clean, z, levels, noise, 1, v) for v in (0.0, cap))
    output = head(process().noised(clean, levels, noise), levels.float(), z)
    mse = (output[:, :C] - noise).square().mean(1)
    signal = process().alphas_cumprod[levels]
    weight = torch.minimum(1 / signal, torch.tensor(cap, dtype=signal.dtype)).float()
    torch.testing.assert_close(weighted - plain, mse * (weight - 1), atol=1e-5, rtol=1e-4)
    assert weight[0] < 1.001 < cap == weight[-1]


def test_the_weighted_error_is_that_of_the_velocity():
    """v = alpha * noise - sigma * x_0, with the x_0 that the estimated noise means."""
    clean, noise, wrong = draw((5, C), "x"), draw((5, C), "n"), draw((5, C), "w")
    t = torch.tensor([100, 300, 500, 700, 850])
    signal = process().alphas_cumprod[t][:, None]
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    noisy = alpha * clean + sigma * noise
    velocities = [alpha * n - sigma * (noisy - sigma * n) / alpha for n in (noise.double(), wrong.double())]
    error = (velocities[0] - velocities[1]).square()
    torch.testing.assert_close(error, (noise - wrong).double().square() / signal)


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match="velocity"):
        parse(TokenDiffusion, {"type": "token_diffusion", "velocity": -1.0}, "recipe")


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_embeddings_begin_with_the_configured_deviation(std):
    config = Config(grid=8, channels=C, classes=10, encoder=SIZE, decoder=SIZE, buffer=4, embedding_std=std)
    model = EMIGM(config, generator=rng.generator(0, "init"))
    for table in (model.encoder_pos_embed_learned, model.decoder_pos_embed_learned, model.class_emb.weight):
        assert table.std().item() == pytest.approx(std, rel=0.1)
