"""MAGVIT-v2's tokenizer with look-up-free quantisation: fixture ``magvit_v2``.

Every entry of the fixture has a rule in `RULES`; one without a rule fails. The network in its published size takes
minutes and is marked slow.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdiff.io.convert import convert
from mmdiff.io.layouts import LAYOUTS
from mmdiff.models.magvit import MAGVIT, Config, SignQuantizer
from mmdiff.models.registry import build
from tests.helpers.golden import root_of, rule, tree_of
from tests.helpers.image_layouts import magvit_shapes

NAME = "magvit_v2"

RULES = {
    r"(full\.)?encoder_z|quantized|decoded(_codes)?|full\.decoded": "close",
    r"(z\.)?(quantizer|entropy)_loss|z\.(grad|quantized)": "close",
    r"(full\.|z\.)?indices": "exact",
}
INPUTS = r"pixels|codes|z|full\.pixels"
TREE = {
    "encoder", "decoder", "in_ch", "out_ch", "norm_groups", "norm_eps", "image", "full", "lfq", "published_state_dict"
}  # fmt: skip
OPTIONAL = {"published_state_dict", "full"}
TOLERANCE = 2e-4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "output" not in metafunc.fixturenames:
        return
    names = sorted(load_file(root_of(metafunc.config, NAME) / "outputs.safetensors"))
    slow = {n: [pytest.mark.slow] if n.startswith("full.") else [] for n in names}
    metafunc.parametrize("output", [pytest.param(n, marks=slow[n]) for n in names])


class Golden:
    """The fixture; networks are loaded from folders in the published layout."""

    def __init__(self, config: Any, folder: Path) -> None:
        root = root_of(config, NAME)
        self.tree = tree_of(config, NAME)
        self.inputs = load_file(root / "inputs.safetensors")
        self.outputs = load_file(root / "outputs.safetensors")
        self.folder = folder
        self.loaded: dict[str, MAGVIT] = {}

    def model(self, size: str) -> MAGVIT:
        if size not in self.loaded:
            self.loaded[size] = MAGVIT.from_pretrained(self.publish(size))
        return self.loaded[size]

    def publish(self, size: str) -> Path:
        folder = self.folder / size
        if not folder.is_dir():
            folder.mkdir()
            tree = self.tree["full"] if size == "full" else {k: self.tree[k] for k in ("encoder", "decoder")}
            (folder / "config.json").write_text(json.dumps({"_class_name": "MAGVITv2", **tree}))
            save_file(weights(tree), folder / "model.safetensors")
        return folder

    def quantizer(self) -> MAGVIT:
        """A network with the set's weights of the losses and as many bits as the features ``z`` have channels."""
        lfq, names = self.tree["lfq"], {"beta": "pull", "commit_loss_multiplier": "commitment"}
        assert set(lfq) == {*names, "entropy_multiplier"}
        config = LAYOUTS["magvit-v2"].read({k: self.tree[k] for k in ("encoder", "decoder")}, {})
        assert config.bits == self.inputs["z"].shape[1]
        weights = {n: lfq[k] for k, n in names.items()}
        return build(dataclasses.replace(config, **weights, entropy=lfq["entropy_multiplier"]))


def weights(tree: dict[str, Any]) -> dict[str, Tensor]:
    """The recipe of the fixture's README; buffers keep their definition."""

    def draw(key: str, shape: tuple[int, ...]) -> Tensor:
        x = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape)
        if key.endswith(".bias"):
            x = 0.05 * x
        else:
            x = 1 + 0.1 * x if len(shape) == 1 else x / np.sqrt(np.prod(shape[1:]))
        return torch.from_numpy(x).float()

    names, bits = magvit_shapes(tree), tree["encoder"]["z_channels"]
    out = {k: draw(k, s) for k, s in names.items() if not k.startswith("quantize.")}
    powers = torch.tensor([2**i for i in reversed(range(bits))])
    out["quantize.power_vals"] = powers
    out["quantize.embedding"] = torch.tensor([[1.0 if c // p % 2 else -1.0 for p in powers] for c in range(2**bits)])
    return out


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.config, tmp_path_factory.mktemp(NAME))


def ours(output: str, golden: Golden) -> Tensor:
    if output.startswith("z."):
        return quantised(output, golden)
    size, _, name = output.rpartition(".")
    model = golden.model(size or "tiny")
    if name == "decoded_codes":
        return decoded_codes(golden)
    pixels = golden.inputs[f"{size}.pixels" if size else "pixels"]
    z = model.features(pixels)
    codes = model.encode(pixels)
    return {
        "encoder_z": lambda: z,
        "quantized": lambda: model.quantize(z),
        "indices": lambda: codes.flatten(1),
        "quantizer_loss": lambda: golden.quantizer().commitment(z),
        "entropy_loss": lambda: golden.quantizer().entropy(z),
        "decoded": lambda: model.decode(codes),
    }[name]()


def decoded_codes(golden: Golden) -> Tensor:
    """A row of codes as a grid: the shape of the result tells which."""
    codes, out = golden.inputs["codes"], golden.outputs["decoded_codes"]
    model = golden.model("tiny")
    rows = out.shape[-2] // model.config.factor
    return model.decode(codes.view(len(codes), rows, -1))


@torch.enable_grad()
def quantised(output: str, golden: Golden) -> Tensor:
    z = golden.inputs["z"].clone().requires_grad_()
    model = golden.quantizer()
    signs, penalty = model.quantize(z), (model.commitment(z), model.entropy(z))
    place = torch.arange(z.numel(), dtype=z.dtype).view(z.shape)
    (sum(penalty) + 0.01 * (place * signs).sum()).backward()
    return {
        "z.quantized": signs.detach(),
        "z.quantizer_loss": penalty[0].detach(),
        "z.entropy_loss": penalty[1].detach(),
        "z.indices": model.quantize.codes(z)[:, None],
        "z.grad": z.grad,
    }[output]


@torch.no_grad()
def test_output_follows_its_rule(output, golden):
    kind, mine, expected = rule(RULES, output), ours(output, golden), golden.outputs[output]
    assert mine.dtype == expected.dtype
    assert mine.shape == expected.shape
    if kind == "exact":
        assert torch.equal(mine, expected)
    else:
        bound = TOLERANCE * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(mine, expected, atol=bound, rtol=0)


def test_every_input_and_option_is_used(golden):
    assert not [n for n in golden.inputs if not re.fullmatch(INPUTS, n)]
    assert set(golden.tree) - OPTIONAL == TREE - OPTIONAL
    groups = golden.model("tiny").encoder.norm_out
    assert (groups.num_groups, groups.eps) == (golden.tree["norm_groups"], golden.tree["norm_eps"])
    assert golden.model("tiny").encoder.conv_in.in_channels == golden.tree["in_ch"]
    assert golden.model("tiny").decoder.conv_out.out_channels == golden.tree["out_ch"]
    assert list(golden.inputs["pixels"].shape[-2:]) == golden.tree["image"]


def test_published_state_dict_is_ours(golden):
    """A set without the list of keys, or without the published size, is held against what is written down here."""
    layout = LAYOUTS["magvit-v2"]
    full = golden.tree.get("full", {k: layout.write(Config())[k] for k in ("encoder", "decoder")})
    table = {k: tuple(v) for k, v in golden.tree.get("published_state_dict", magvit_shapes(full)).items()}
    assert table == magvit_shapes(full)
    config = layout.read({"_class_name": "MAGVITv2", **full}, {})
    own = build(config, device="meta").state_dict()
    keys = layout.key_map(config)
    assert {keys.backward(k): tuple(v.shape) for k, v in own.items()} == table


def test_a_file_that_names_no_sizes_has_the_published_ones():
    read = LAYOUTS["magvit-v2"].read
    assert read({"_class_name": "MAGVITv2"}, {}) == Config()
    assert read(LAYOUTS["magvit-v2"].write(Config()), {}) == Config()


def test_conversion_goes_both_ways(golden, tmp_path):
    source = golden.publish("tiny")
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    first, last = (load_file(f / "model.safetensors") for f in (source, tmp_path / "back"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[k], last[k]) and first[k].dtype == last[k].dtype for k in first)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_weights_without_a_configuration_are_recognised(golden, tmp_path):
    tensors = load_file(golden.publish("tiny") / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    loaded = MAGVIT.from_pretrained(tmp_path / "pytorch_model.bin")
    codes = loaded.encode(golden.inputs["pixels"])
    assert torch.equal(codes, golden.model("tiny").encode(golden.inputs["pixels"]))


def test_signs_and_codes_are_inverse():
    quantizer = SignQuantizer(6)
    codes = torch.arange(64).view(1, 8, 8)
    assert torch.equal(quantizer.codes(quantizer.vectors(codes)), codes)
