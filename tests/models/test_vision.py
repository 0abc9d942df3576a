"""The SigLIP tower against transformers' own, and the connector's key names."""

from __future__ import annotations

import pytest
import torch

from mmdiff import rng
from mmdiff.errors import ConfigError
from mmdiff.models.vision import Config, SiglipTower, connector

TINY = Config(image_size=30, patch_size=7, width=48, depth=3, heads=4, ffn_width=80)


@torch.no_grad()
def test_features_equal_those_of_transformers() -> None:
    from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipVisionModel

    reference = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=30,
            patch_size=7,
        )
    ).eval()
    published = {k.removeprefix("vision_model."): v for k, v in reference.state_dict().items()}
    kept = {k: v for k, v in published.items() if not k.startswith(("head.", "encoder.layers.3."))}
    tower = SiglipTower(TINY).eval()
    tower.load_state_dict(kept)
    pixels = torch.rand(2, 3, 30, 30, generator=rng.generator(0, "pixels")) * 2 - 1
    states = reference(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower(pixels), states[3], atol=1e-5, rtol=1e-5)
    assert tower(pixels).shape == (2, TINY.tokens, 48) == (2, 16, 48)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(30, 30\)"):
        SiglipTower(TINY)(torch.zeros(1, 3, 28, 28))


def test_connector_has_the_published_keys() -> None:
    assert sorted(connector(4, 6).state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
