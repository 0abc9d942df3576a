"""The FID Inception with drawn weights, through every pipeline: fixture ``inception_recipe``."""

from __future__ import annotations

import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.features import open_network
from eval.inception import Inception, preprocess, read_weights

NAME = "inception_recipe"
TOLERANCE = 1e-5
"""Of the largest absolute value of each tensor."""

TAPS = {
    **{tap: ("tf1", tap) for tap in ("64", "192", "768", "2048", "logits_unbiased", "logits")},
    "adm_spatial": ("tf1", "spatial"),
    **{f"pytorch_fid_{tap}": ("pytorch", tap) for tap in ("64", "192", "768", "2048")},
    "clean_2048": ("clean", "2048"),
    "2048_float64_network": ("tf1", "2048"),
}
"""The fixture's word -> our pipeline and tap."""

POOLS = {
    "MaxPool_1": lambda seen: torch.nn.functional.max_pool2d(seen["Conv2d_2b_3x3"], 3, stride=2),
    "MaxPool_2": lambda seen: torch.nn.functional.max_pool2d(seen["Conv2d_4a_3x3"], 3, stride=2),
    "AvgPool": lambda seen: seen["Mixed_7c"].mean(dim=(2, 3), keepdim=True),
}


def folder(config: pytest.Config) -> Path:
    return Path(config.getoption("--fixtures")) / NAME


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(folder(metafunc.config) / "outputs.safetensors")))


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Path:
    return folder(request.config)


@pytest.fixture(scope="module")
def config(root: Path) -> dict:
    return json.loads((root / "config.json").read_text())


@pytest.fixture(scope="module")
def outputs(root: Path) -> dict[str, Tensor]:
    return load_file(root / "outputs.safetensors")


@pytest.fixture(scope="module")
def images(root: Path, config: dict) -> dict[str, Tensor]:
    found = load_file(root / "inputs.safetensors")
    formulas = {k.removesuffix("_image"): v for k, v in config.items() if k.endswith("_image")}
    return found | {name: formula_image(**about)[None] for name, about in formulas.items()}


def formula_image(height: int, width: int, shift: int) -> Tensor:
    y, x = np.indices((height, width), dtype=np.int64)
    channels = [(3 * x + 5 * y + shift) % 256, (x * x // 7 + y + 2 * shift) % 256, (x ^ y) % 256]
    return torch.from_numpy(np.stack(channels).astype(np.uint8))


def drawn(key: str, shape: list[int], gain: float) -> Tensor:
    """One tensor by the recipe of the fixture's README."""
    n = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if key.endswith("conv.weight"):
        value = n * gain / math.sqrt(math.prod(shape[1:]))
    elif key.endswith("bn.weight"):
        value = 1 + 0.1 * n
    elif key.endswith(("bn.bias", "bn.running_mean")):
        value = 0.1 * n
    elif key.endswith("bn.running_var"):
        value = np.exp(0.2 * n)
    else:
        value = {"fc.weight": 0.05, "fc.bias": 0.5}[key] * n
    return torch.from_numpy(np.asarray(value, dtype=np.float64)).float()


@pytest.fixture(scope="module")
def weights(config: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {key: drawn(key, shape, config["conv_gain"]) for key, shape in config["keys"].items()}
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def net(weights: Path) -> Inception:
    return Inception().load(read_weights(weights), "drawn")


@pytest.fixture(scope="module")
def taps(net: Inception, images: dict[str, Tensor]) -> dict[tuple[str, str], dict[str, Tensor]]:
    with torch.inference_mode():
        return {
            (name, pipeline): net(preprocess(image, pipeline=pipeline))
            for name, image in images.items()
            for pipeline in ("tf1", "pytorch", "clean")
        }


def close(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    bound = TOLERANCE * float(expected.abs().max())
    torch.testing.assert_close(ours.double(), expected.double(), atol=bound, rtol=0)


def test_drawn_weights_are_the_fixtures(config: dict) -> None:
    for key, first in config["weights_check"].items():
        ours = drawn(key, config["keys"][key], config["conv_gain"]).flatten()[: len(first)]
        assert ours.double().tolist() == pytest.approx(first, rel=1e-6)


def test_network_has_exactly_the_published_tensors(config: dict) -> None:
    with torch.device("meta"):
        state = Inception().state_dict()
    ours = {k: list(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert ours == config["keys"]
    assert list(ours) == list(config["keys"])


def test_output_follows_its_rule(output: str, outputs, taps, images, net: Inception) -> None:
    name, _, word = output.partition(".")
    assert word in TAPS, f"{output} has no rule"
    pipeline, tap = TAPS[word]
    if not word.endswith("_float64_network"):
        close(taps[name, pipeline][tap], outputs[output])
        return
    with torch.inference_mode():
        double = net.double()(preprocess(images[name]).double())[tap]
        net.float()
    close(double, outputs[output])


def test_every_image_has_outputs(images, outputs) -> None:
    assert set(images) == {name.partition(".")[0] for name in outputs}


def test_block_outputs(config: dict, images, net: Inception) -> None:
    for name, blocks in config["block_outputs_mean_std_shape"].items():
        seen: dict[str, Tensor] = {}
        hooks = [
            child.register_forward_hook(lambda _, __, out, key=key, seen=seen: seen.setdefault(key, out))
            for key, child in net.named_children()
        ]
        with torch.inference_mode():
            net(preprocess(images[name]))
        for hook in hooks:
            hook.remove()
        for block, (mean, std, shape) in blocks.items():
            assert block in POOLS or block in seen, f"{block} has no rule"
            out = POOLS[block](seen) if block in POOLS else seen[block]
            assert list(out.shape) == shape, block
            assert float(out.double().mean()) == pytest.approx(mean, rel=1e-4), block
            assert float(out.double().std(correction=0)) == pytest.approx(std, rel=1e-4), block


def test_recipe_is_the_one_this_test_draws(config: dict) -> None:
    known = {"seed", "generator", "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"}
    assert set(config["recipe"]) == known | {"fc.weight", "fc.bias"}
    assert re.search(r"crc32\(key\) & 0x7fffffff", config["recipe"]["seed"])


def test_public_door_gives_the_same_features(weights: Path, images, outputs) -> None:
    for word, family in (
        ("2048", "inception"),
        ("pytorch_fid_2048", "inception-pytorch"),
        ("clean_2048", "inception-clean"),
    ):
        network = open_network(f"{family}:{weights}")
        for name, image in images.items():
            with torch.inference_mode():
                found = network.taps(image)
            close(found["features"], outputs[f"{name}.{word}"])
            if family == "inception":
                close(found["spatial"], outputs[f"{name}.adm_spatial"])
                close(found["logits"], outputs[f"{name}.logits_unbiased"])
