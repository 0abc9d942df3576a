"""The perceptual term: features of the file's own weights, differentiable in the images alone, refused where wrong."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mmdiff import rng
from mmdiff.batch import Batch
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.models import vq
from mmdiff.training.autoencoding import Autoencoding, Perceptual, _stages


def pixels(seed: int, side: int = 32) -> torch.Tensor:
    return 2 * rng.uniform(rng.generator(seed, "pixels"), (2, 3, side, side)) - 1


@pytest.fixture(scope="module", params=["vgg11", "resnet18"])
def perceptual(request, tmp_path_factory):
    """A network of small random weights, saved with timm's names."""
    stages = timm.create_model(request.param, pretrained=False, features_only=True)
    draw = rng.generator(0, "weights")
    state = {k: 0.05 * rng.normal(draw, v.shape) if v.dim() > 1 else v for k, v in stages.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    renamed = {k.replace("features_", "features."): v.contiguous() for k, v in state.items()}
    save_file({**renamed, "classifier.weight": torch.zeros(2, 2)}, path)
    return Perceptual(network=request.param, weights=str(path))


def test_the_features_are_those_of_the_file(perceptual):
    stages, mean, std = _stages(perceptual.network, perceptual.weights, torch.device("cpu"))
    x = ((pixels(0) + 1) / 2 - mean) / std
    plain = timm.create_model(perceptual.network, pretrained=False, features_only=True).eval()
    plain.load_state_dict(
        {
            k.replace("features.", "features_"): v
            for k, v in load_file(perceptual.weights).items()
            if "classifier" not in k
        }
    )
    for mine, theirs in zip(stages(x), plain(x), strict=True):
        assert torch.equal(mine, theirs)


def test_equal_images_are_at_no_distance_and_only_the_output_learns(perceptual):
    a, b = pixels(1).requires_grad_(), pixels(2)
    assert float(perceptual.distance(b, b)) == 0
    distance = perceptual.distance(a, b)
    assert distance.item() > 0
    distance.backward()
    assert float(a.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in _stages(perceptual.network, perceptual.weights, a.device)[0].parameters())


def batch_of(images):
    return Batch(
        ids=torch.zeros(2, 0, dtype=torch.long),
        labels=torch.zeros(2, 0, dtype=torch.long),
        weights=torch.zeros(2, 0),
        valid=torch.zeros(2, 0, dtype=torch.bool),
        droppable=torch.zeros(2, 0, dtype=torch.bool),
        pixels=images,
        tasks=["image", "image"],
        keys=["a", "b"],
    )


def test_the_share_of_used_codes_is_reported():
    model = vq.VQ(vq.Config(image_size=32, widths=(8, 8), blocks=0, levels=(5, 4)), generator=rng.generator(0))
    losses = Autoencoding()(model, batch_of(pixels(3)), rng.generator(0))
    total, count = losses.terms["usage"]
    distinct = [len(codes.unique()) for codes in model.encode(pixels(3))]
    assert 1 < min(distinct)
    assert float(total) / count == pytest.approx(sum(distinct) / len(distinct) / 20)


def test_the_term_is_added_with_its_weight(perceptual):
    model = vq.VQ(vq.Config(image_size=32, widths=(8, 8), blocks=0, levels=(5, 4)), generator=rng.generator(0))
    batch = batch_of(pixels(3))
    source = rng.generator(0)
    with torch.no_grad():
        plain = Autoencoding()(model, batch, source).total
        both = Autoencoding(perceptual=Perceptual(network=perceptual.network, weights=perceptual.weights, weight=2.0))
        extra = both(model, batch, source).total - plain
        assert float(extra) == pytest.approx(2 * float(perceptual.distance(model(pixels(3))[0], pixels(3))), rel=1e-4)


def test_a_wrong_network_or_file_is_named(tmp_path, perceptual):
    with pytest.raises(ConfigError, match="timm has no model"):
        Perceptual(network="vgg_sixteen").distance(pixels(0), pixels(1))
    with pytest.raises(ConfigError, match="32 pixels at least"):
        perceptual.distance(pixels(0, 16), pixels(1, 16))
    save_file({"stem.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="timm's names"):
        Perceptual(network="resnet18", weights=str(tmp_path / "other.safetensors")).distance(pixels(0), pixels(1))
