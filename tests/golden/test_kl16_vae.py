"""The stride-16 KL autoencoder against the published code: fixture ``kl16_vae``.

Every output tensor has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdiff.io.layouts import LAYOUTS
from mmdiff.models.registry import build
from mmdiff.models.vae import KLVAE, Config, posterior
from tests.helpers import recipe

NAME = "kl16_vae"
ATOL = 1e-4
INPUTS = ("image", "post_noise", "latent")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--fixtures")) / NAME
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(json.loads((root / "config.json").read_text())["cases"]))
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(root / "outputs.safetensors")))


class Golden:
    """The fixture; networks are loaded from checkpoints in the published layout."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((root / "config.json").read_text())
        self.inputs = load_file(root / "inputs.safetensors")
        self.outputs = load_file(root / "outputs.safetensors")
        self.folder = folder
        self.loaded: dict[str, KLVAE] = {}

    def model(self, case: str) -> KLVAE:
        if case not in self.loaded:
            self.loaded[case] = self._load(case, self.config["cases"][case])
        return self.loaded[case]

    def _load(self, case: str, spec: dict[str, Any]) -> KLVAE:
        folder = self.folder / case
        folder.mkdir()
        tree = {k: v for k, v in spec.items() if k not in ("batch", "size")}
        tree |= {"num_res_blocks": self.config["num_res_blocks"], "scale_to_model": self.config["scale_to_model"]}
        shapes = {
            k: tuple(v.shape) for k, v in build(LAYOUTS["kl16"].read(tree, {}), device="meta").state_dict().items()
        }
        torch.save({"model": recipe.tensors(shapes)}, folder / "kl16.ckpt")
        (folder / "config.json").write_text(json.dumps(tree))
        return KLVAE.from_pretrained(folder / "kl16.ckpt")


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(Path(request.config.getoption("--fixtures")) / NAME, tmp_path_factory.mktemp(NAME))


def mean_and_std(golden: Golden, case: str) -> tuple[Tensor, Tensor]:
    if case == "clamp":
        return posterior(golden.inputs["clamp/moments"])
    return posterior(golden.model(case).moments(golden.inputs[f"{case}/image"]))


RULES: dict[str, Callable[[Golden, str], Tensor]] = {
    "moments": lambda g, c: g.model(c).moments(g.inputs[f"{c}/image"]),
    "moments_flip": lambda g, c: g.model(c).moments(g.inputs[f"{c}/image"].flip(-1)),
    "mean": lambda g, c: mean_and_std(g, c)[0],
    "std": lambda g, c: mean_and_std(g, c)[1],
    "model_latent": lambda g, c: g.model(c).encode(g.inputs[f"{c}/image"], g.inputs[f"{c}/post_noise"]),
    "decoded": lambda g, c: g.model(c).decode(g.inputs[f"{c}/latent"]),
    "decoded_mean": lambda g, c: g.model(c).decode(mean_and_std(g, c)[0] * g.model(c).config.scale),
}


@torch.no_grad()
def test_output_follows_its_rule(output, golden):
    case, _, name = output.partition("/")
    assert name in RULES, f"{output} has no rule"
    assert case == "clamp" or case in golden.config["cases"]
    expected = golden.outputs[output]
    torch.testing.assert_close(RULES[name](golden, case), expected, atol=ATOL, rtol=1e-6 if case == "clamp" else 0)


def test_every_input_is_used(golden):
    known = "|".join(re.escape(c) for c in golden.config["cases"])
    pattern = rf"clamp/moments|({known})/({'|'.join(INPUTS)})"
    assert not [n for n in golden.inputs if not re.fullmatch(pattern, n)]


def test_every_case_of_the_configuration_has_outputs(case, golden):
    if f"{case}/image" in golden.inputs:
        assert [n for n in golden.outputs if n.startswith(f"{case}/")]


def test_published_state_dict_is_ours(golden):
    table = golden.config["published_state_dict"]
    table = dict(table) if isinstance(table, list) else table
    ours = {k: list(v.shape) for k, v in build(Config(), device="meta").state_dict().items()}
    assert ours == table
    assert sum(math.prod(s) for s in ours.values()) == golden.config["published_parameters"]
    assert Config().scale == golden.config["scale_to_model"]
