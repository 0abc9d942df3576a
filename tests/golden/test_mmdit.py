"""The SD3 network, its sampler and its training quantities against diffusers: fixture ``mmdit``.

Every tensor of the fixture has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdiff.diffusion import flow
from mmdiff.io.convert import convert
from mmdiff.models.mmdit import MMDiT
from mmdiff.sampling import flow as sampler

NAME = "mmdit"

RULES: dict[str, tuple[float, float]] = {
    r"patch_tokens|temb|context0|block\d+\.(image|context)|sample|sample_skip_layers": (3e-5, 0),
    r"flow\.latent": (1e-4, 0),
    r"flow\.(sigmas|timesteps)|sched\.sigmas_shift[\d.]+_n\d+": (1e-9, 1e-6),
    r"train\.(sigma|weight_cosmap|weight_sigma_sqrt)|grid\.(mode|shift)[\d.]+": (1e-7, 1e-6),
    r"train\.(x_t|target|mse_per_sample)": (3e-5, 0),
    r"grid\.u": (0, 0),
}
"""Pattern -> (absolute, relative) tolerance; zero for both: an input."""

INPUTS = {
    *("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
    *("flow.noise", "flow.cond", "flow.uncond", "flow.cond_pooled", "flow.uncond_pooled"),
    *("train.normal", "train.x0", "train.noise"),
}


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
def published(root: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in diffusers' layout."""
    out = tmp_path_factory.mktemp("sd3")
    (out / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel", **options["model"]}))
    shutil.copy(root / "weights.safetensors", out / "diffusion_pytorch_model.safetensors")
    return out


@pytest.fixture(scope="module")
def model(published: Path) -> MMDiT:
    return MMDiT.from_pretrained(published)


def sample(model: MMDiT, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    names = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")
    return model(*(inputs[name] for name in names), **options)


def inside(model: MMDiT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the network computes on the way, by the names of the fixture."""
    seen: dict[str, Tensor] = {"patch_tokens": model.tokens(inputs["hidden_states"])}
    seen["temb"] = model.time(inputs["timestep"]) + model.pooled(inputs["pooled_projections"])
    seen["context0"] = model.context(inputs["encoder_hidden_states"])

    def keep(i: int, out: tuple[Tensor, Tensor]) -> None:
        seen.update({f"block{i}.image": out[0], f"block{i}.context": out[1]})

    hooks = [b.register_forward_hook(lambda _, __, out, i=i: keep(i, out)) for i, b in enumerate(model.blocks)]
    seen["sample"] = sample(model, inputs)
    for hook in hooks:
        hook.remove()
    return seen


def latent(model: MMDiT, inputs: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """The whole run of the sampler."""
    spec = options["flow"]

    def velocity(x: Tensor, sigma: Tensor, conditional: bool) -> Tensor:
        kind = "cond" if conditional else "uncond"
        t = sigma * spec["num_train_timesteps"]
        return model(x, t, inputs[f"flow.{kind}"], inputs[f"flow.{kind}_pooled"])

    sigmas = flow.schedule(spec["num_steps"], spec["shift"], train_steps=spec["num_train_timesteps"])
    return sampler.integrate(sampler.guided(velocity, spec["guidance_scale"]), inputs["flow.noise"], sigmas)


def training(model: MMDiT, inputs: dict[str, Tensor], options: dict[str, Any], name: str) -> Tensor:
    sigma = flow.logit_normal(inputs["train.normal"])
    x0, noise = inputs["train.x0"], inputs["train.noise"]
    noisy, target = flow.noised(x0, noise, sigma), flow.velocity(x0, noise)
    if name == "mse_per_sample":
        t = sigma * options["flow"]["num_train_timesteps"]
        predicted = model(noisy, t, inputs["encoder_hidden_states"], inputs["pooled_projections"])
        return flow.per_sample_loss(predicted, target)
    return {
        "sigma": sigma,
        "x_t": noisy,
        "target": target,
        "weight_cosmap": flow.cosmap_weight(sigma),
        "weight_sigma_sqrt": flow.sigma_sqrt_weight(sigma),
    }[name]


def ours(name: str, model: MMDiT, inputs: dict[str, Tensor], outputs: dict[str, Tensor], c: dict[str, Any]) -> Tensor:
    family, _, part = name.partition(".")
    if family == "train":
        return training(model, inputs, c, part)
    if family == "grid":
        kind, number = re.fullmatch(r"([a-z]+)([\d.]+)", part).groups()
        return {"mode": flow.mode, "shift": flow.shifted}[kind](outputs["grid.u"], float(number))
    if family == "sched":
        shift, steps = re.fullmatch(r"sigmas_shift([\d.]+)_n(\d+)", part).groups()
        return flow.schedule(int(steps), float(shift), train_steps=c["flow"]["num_train_timesteps"])
    if name == "flow.latent":
        return latent(model, inputs, c)
    if family == "flow":
        spec = c["flow"]
        sigmas = flow.schedule(spec["num_steps"], spec["shift"], train_steps=spec["num_train_timesteps"])
        return sigmas if part == "sigmas" else sigmas[:-1] * spec["num_train_timesteps"]
    if name == "sample_skip_layers":
        return sample(model, inputs, skip_layers=c["skip_layers"])
    return inside(model, inputs)[name]


@torch.inference_mode()
def test_output_follows_its_rule(output, model, inputs, outputs, options):
    rule = next((rule for pattern, rule in RULES.items() if re.fullmatch(pattern, output)), None)
    assert rule is not None, f"{output} has no rule"
    if rule != (0, 0):
        found = ours(output, model, inputs, outputs, options)
        torch.testing.assert_close(found, outputs[output], atol=rule[0], rtol=rule[1])


def test_every_input_and_option_is_known(inputs, options):
    assert set(inputs) == INPUTS
    assert set(options) <= {"model", "flow", "skip_layers"}


def test_the_position_table_is_the_computed_one(model):
    torch.testing.assert_close(model.pos_embed, MMDiT(model.config).pos_embed, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_the_checkpoint_survives_both_conversions(published, root, inputs, outputs, tmp_path):
    convert(published, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs")
    back, weights = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(root / "weights.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], weights[k]) for k in weights)
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        found = sample(MMDiT.from_pretrained(folder), inputs)
        torch.testing.assert_close(found, outputs["sample"], atol=3e-5, rtol=0)
