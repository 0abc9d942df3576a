"""DiT in standard parametrisation and in muP against the published code: fixture ``dit``.

Every tensor of the fixture has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdiff.diffusion.flow import guide
from mmdiff.io.convert import convert
from mmdiff.models.dit import DiT
from mmdiff.scale import mup

NAME = "dit"
ATOL = 2e-5

RULES = {r"tokens|t_emb|y_emb|block\d+": "tolerance", r"(sp|mup)\.(sample|cfg)": "tolerance"}
INPUTS = {"x", "t", "y", "cfg_x", "cfg_t", "cfg_y"}
MUP_FIELDS = ("output_mult", "base_hidden_size", "base_num_heads", "delta_hidden_size", "delta_num_heads")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--fixtures")) / NAME
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(root / "outputs.safetensors")))


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--fixtures")) / NAME


@pytest.fixture(scope="module")
def options(root: Path) -> dict[str, Any]:
    return json.loads((root / "config.json").read_text())


@pytest.fixture(scope="module")
def inputs(root: Path) -> dict[str, Tensor]:
    return load_file(root / "inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(root: Path) -> dict[str, Tensor]:
    return load_file(root / "outputs.safetensors")


@pytest.fixture(scope="module")
def publish(root: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``sp`` or ``mup`` -> folder with the published weights and the arguments of the network."""

    def folder(variant: str) -> Path:
        out = tmp_path_factory.mktemp(variant)
        tree = {k: v for k, v in options.items() if k != "cfg_scale" and (variant == "mup" or k not in MUP_FIELDS)}
        (out / "config.json").write_text(json.dumps(tree))
        shutil.copy(root / "weights.safetensors", out / "model.safetensors")
        return out

    return folder


def run(model: DiT, name: str, inputs: dict[str, Tensor], scale: float) -> Tensor:
    """What we compute for an output of the fixture."""
    seen: dict[str, Tensor] = {}
    parts = {"t_emb": model.t_embedder, "y_emb": model.y_embedder}
    parts |= {f"block{i}": block for i, block in enumerate(model.blocks)}
    hooks = [part.register_forward_hook(lambda _, __, out, n=n: seen.update({n: out})) for n, part in parts.items()]
    hooks.append(model.blocks[0].register_forward_pre_hook(lambda _, given: seen.update(tokens=given[0])))
    prefix = "cfg_" if name == "cfg" else ""
    with torch.inference_mode():
        out = model(*(inputs[f"{prefix}{k}"] for k in ("x", "t", "y")))
    for hook in hooks:
        hook.remove()
    if name != "cfg":
        return seen.get(name, out)
    with_class, without = out.chunk(2)
    guided = guide(with_class, without, scale, channels=3)
    return torch.cat((guided, torch.cat((guided[:, :3], without[:, 3:]), dim=1)))


def test_output_follows_its_rule(output, inputs, outputs, options, publish):
    rule = next((rule for pattern, rule in RULES.items() if re.fullmatch(pattern, output)), None)
    assert rule is not None, f"{output} has no rule"
    variant, _, name = output.rpartition(".")
    for kind in [variant] if variant else ["sp", "mup"]:
        ours = run(DiT.from_pretrained(publish(kind)), name, inputs, options["cfg_scale"])
        torch.testing.assert_close(ours, outputs[output], atol=ATOL, rtol=0)


def test_every_input_is_known(inputs):
    assert set(inputs) == INPUTS


def test_the_position_table_is_the_computed_one(publish):
    model = DiT.from_pretrained(publish("sp"))
    torch.testing.assert_close(model.pos_embed, DiT(model.config).pos_embed, atol=1e-6, rtol=0)
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize("variant", ["sp", "mup"])
def test_the_checkpoint_survives_both_conversions(variant, publish, root, inputs, outputs, options, tmp_path):
    convert(publish(variant), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs")
    back, weights = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(root / "weights.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], weights[k]) for k in weights)
    expected = outputs[f"{variant}.sample"]
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        ours = run(DiT.from_pretrained(folder), "sample", inputs, options["cfg_scale"])
        torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)


def test_a_folded_checkpoint_computes_the_same_in_a_plain_network(publish, root, inputs, outputs, options, tmp_path):
    muped = DiT.from_pretrained(publish("mup"))
    folder = publish("sp")
    plain = mup.fold(load_file(root / "weights.safetensors"), {"final_layer.linear.weight": muped.config.readout_scale})
    save_file(plain, folder / "model.safetensors")
    ours = run(DiT.from_pretrained(folder), "sample", inputs, options["cfg_scale"])
    torch.testing.assert_close(ours, outputs["mup.sample"], atol=ATOL, rtol=0)
