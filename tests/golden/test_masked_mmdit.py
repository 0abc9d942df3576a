"""The masked MMDiT and its scheduler against the published code: fixture ``masked_mmdit``.

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

from mmdiff.io.convert import convert
from mmdiff.models.masked_mmdit import MaskedMMDiT
from mmdiff.nn import axial
from mmdiff.sampling import masked_grid

NAME = "masked_mmdit"
ATOL = 3e-5

RULES = {
    r"temb|image_tokens|block\d+\.(image|context)|single\d+|(image|text)_logits": "tolerance",
    r"sched\.temperatures": "tolerance",
    r"sched\.(sample\d+|num_masked|timesteps)": "exact",
}
INPUTS = {
    *("input_ids", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "micro_conds"),
    *("sched.init", "sched.logits", "sched.pred", "sched.uniform"),
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
    """A folder in the published layout."""
    out = tmp_path_factory.mktemp("meissonic")
    (out / "config.json").write_text(json.dumps(options["model"]))
    shutil.copy(root / "weights.safetensors", out / "model.safetensors")
    return out


@pytest.fixture(scope="module")
def model(published: Path) -> MaskedMMDiT:
    return MaskedMMDiT.from_pretrained(published)


def given(inputs: dict[str, Tensor]) -> list[Tensor]:
    names = ("input_ids", "timestep", "encoder_hidden_states", "pooled_projections", "micro_conds")
    return [inputs[name] for name in names]


def inside(model: MaskedMMDiT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the network computes, by the names of the fixture."""
    seen = {"image_tokens": model.embed(inputs["input_ids"])}
    seen["temb"] = model.condition(inputs["timestep"], inputs["pooled_projections"], inputs["micro_conds"])

    def keep(i: int, out: tuple[Tensor, Tensor]) -> None:
        seen.update({f"block{i}.image": out[0], f"block{i}.context": out[1]})

    hooks = [b.register_forward_hook(lambda _, __, out, i=i: keep(i, out)) for i, b in enumerate(model.blocks)]
    hooks += [
        b.register_forward_hook(lambda _, __, out, i=i: seen.update({f"single{i}": out}))
        for i, b in enumerate(model.singles)
    ]
    seen["image_logits"] = model(*given(inputs))
    if model.config.text_vocab_size is not None:
        seen["image_logits"], seen["text_logits"] = model.both(*given(inputs))
    for hook in hooks:
        hook.remove()
    return seen


def schedule(options: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scheduler's run over recorded logits, draws and uniform numbers."""
    spec = options["scheduler"]
    steps, mask_id = spec["num_inference_steps"], spec["mask_token_id"]
    heat = spec["temperature"]
    heats = masked_grid.temperatures(tuple(map(float, heat)) if isinstance(heat, list) else float(heat), steps)
    grid = inputs["sched.init"].flatten(1)
    left, samples = [], {}
    for s in range(steps):
        masked = grid == mask_id
        drawn = inputs["sched.pred"][s]
        log_p = inputs["sched.logits"][s].flatten(2).transpose(1, 2).log_softmax(-1)
        log_p = log_p.gather(-1, drawn[..., None])[..., 0].clamp_min(torch.tensor(1e-20).log())
        noise = -torch.log((-torch.log(inputs["sched.uniform"][s].clamp_min(1e-20))).clamp_min(1e-20))
        count = masked_grid.still_masked(s, steps, grid.shape[1], masked.sum(1), spec["masking_schedule"])
        again = masked_grid.remask(log_p, masked, count, heats[s] * noise)
        grid = torch.where(masked, drawn, grid).masked_fill(again, mask_id)
        left.append((grid == mask_id).sum(1))
        samples[f"sched.sample{s}"] = grid.view_as(inputs["sched.init"])
    # The published scheduler counts its time steps down to 0.
    return samples | {
        "sched.num_masked": torch.stack(left),
        "sched.temperatures": heats,
        "sched.timesteps": torch.arange(steps).flip(0),
    }


@torch.inference_mode()
def test_output_follows_its_rule(output, model, inputs, outputs, options):
    rule = next((rule for pattern, rule in RULES.items() if re.fullmatch(pattern, output)), None)
    assert rule is not None, f"{output} has no rule"
    found = (schedule(options, inputs) if output.startswith("sched.") else inside(model, inputs))[output]
    atol = 0 if rule == "exact" else ATOL
    torch.testing.assert_close(found, outputs[output], atol=atol, rtol=0, check_dtype=False)


def test_every_input_and_option_is_known(inputs, options):
    assert set(inputs) == INPUTS
    assert set(options) == {"kind", "model", "scheduler"}


def test_rotary_positions_are_those_of_the_grid(inputs, model):
    step = 2 if model.config.resample else 1
    rows, columns = (n // step for n in inputs["input_ids"].shape[1:])
    torch.testing.assert_close(axial.grid_positions((1, rows, columns)).float(), inputs["img_ids"].float())
    assert not inputs["txt_ids"].any()


@torch.inference_mode()
def test_the_checkpoint_survives_both_conversions(published, root, inputs, outputs, tmp_path):
    convert(published, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs")
    back, weights = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(root / "weights.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], weights[k]) for k in weights)
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        found = MaskedMMDiT.from_pretrained(folder)(*given(inputs))
        torch.testing.assert_close(found, outputs["image_logits"], atol=ATOL, rtol=0)
