"""The resizes of the FID tools against the published ones: fixture ``fid_resize``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eval.resize import RESIZES

NAME = "fid_resize"

PIPELINES = {
    "tf1_bilinear": ("tf1", 0.0, 1.0),
    "pytorch_bilinear_unit_range": ("pytorch", 1e-6, 255.0),
    "clean_pil_bicubic": ("clean", 1e-4, 1.0),
    "clean_legacy_pytorch": ("clean-legacy-pytorch", 1e-4, 1.0),
}
"""The fixture's word -> our pipeline, absolute tolerance (0: bit by bit), and what our values are divided by."""

SUMMARY = ("mean", "sum_of_squares", "max", "min")


def folder(config: pytest.Config) -> Path:
    return Path(config.getoption("--fixtures")) / NAME


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = folder(metafunc.config)
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(root / "outputs.safetensors")))
    if "summary" in metafunc.fixturenames:
        images = json.loads((root / "config.json").read_text())["images"]
        metafunc.parametrize("summary", [f"{i}.{k}" for i, v in images.items() for k in v if k != "shape"])


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Path:
    return folder(request.config)


@pytest.fixture(scope="module")
def config(root: Path) -> dict:
    return json.loads((root / "config.json").read_text())


@pytest.fixture(scope="module")
def images(root: Path, config: dict) -> dict[str, Tensor]:
    stored = load_file(root / "inputs.safetensors")
    for name, about in config["images"].items():
        if name not in stored:
            height, width = about["shape"][:2]
            y, x = np.indices((height, width), dtype=np.int64)
            channels = [(3 * x + 5 * y) % 256, (x * x // 7 + y) % 256, (x ^ y) % 256]
            stored[name] = torch.from_numpy(np.stack(channels, axis=-1).astype(np.uint8))
    return stored


def resized(image: Tensor, word: str, size: tuple[int, int]) -> Tensor:
    """Our result [H, W, 3], in the fixture's range."""
    pipeline, _, scale = PIPELINES[word]
    return (RESIZES[pipeline](image.permute(2, 0, 1)[None], *size)[0] / scale).permute(1, 2, 0)


def check(ours: Tensor, expected: Tensor, word: str) -> None:
    tolerance = PIPELINES[word][1]
    assert ours.shape == expected.shape
    if tolerance:
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)
    else:
        assert torch.equal(ours, expected)


def test_output_follows_its_rule(output: str, root: Path, config: dict, images: dict[str, Tensor]) -> None:
    expected = load_file(root / "outputs.safetensors")[output]
    name, _, rest = output.rpartition(".")
    parts = re.fullmatch(rf"({'|'.join(PIPELINES)})(?:_to_(\d+)x(\d+)|(_full_first_channel))?", rest)
    assert parts is not None, f"{output} has no rule"
    word, height, width, whole = parts.groups()
    if height:
        check(resized(images[name], word, (int(height), int(width))), expected, word)
        return
    ours = resized(images[name], word, tuple(config["target"][:2]))
    step = config["stride"]
    check(ours[..., 0] if whole else ours[::step, ::step], expected, word)


def test_summary_of_the_whole_result(summary: str, config: dict, images: dict[str, Tensor]) -> None:
    name, _, word = summary.rpartition(".")
    expected = config["images"][name][word]
    assert word in PIPELINES, f"{summary} has no rule"
    assert set(expected) <= set(SUMMARY), f"{summary} holds something that has no rule"
    ours = resized(images[name], word, tuple(config["target"][:2])).double()
    flat = ours.flatten(0, 1)
    found = {
        "mean": flat.mean(dim=0).tolist(),
        "sum_of_squares": flat.square().sum(dim=0).tolist(),
        "max": float(ours.max()),
        "min": float(ours.min()),
    }
    tolerance = PIPELINES[word][1]
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6, abs=tolerance or 1e-9), key


def test_every_image_is_used(root: Path, config: dict, images: dict[str, Tensor]) -> None:
    used = {name.rpartition(".")[0] for name in load_file(root / "outputs.safetensors")}
    assert set(images) == set(config["images"]) == used
    assert all(list(images[n].shape) == about["shape"] for n, about in config["images"].items())
