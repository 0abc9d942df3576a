"""LLaDA's pre-training and fine-tuning losses against the published snippets: fixture ``llada_loss``.

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

from mmdiff.diffusion import masking, objectives
from mmdiff.io.layouts import LAYOUTS
from mmdiff.models.llada import LLaDA

NAME = "llada_loss"

RULES: dict[str, tuple[float, float]] = {
    r"\w+\.(noisy|masked|answer_lengths)": (0, 0),
    r"\w+\.p_mask": (1e-6, 0),
    r"\w+\.loss": (1e-4, 0),
    r"\w+\.token_loss": (1e-3, 1e-3),
    r"\w+\.grad\.\w+": (1e-4, 0),
}
"""Output -> absolute and relative tolerance; that of gradients is in parts of the largest entry."""

INPUTS = r"\w+\.(input_ids|t|u|random_length|prompt_lengths)"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--fixtures")) / NAME
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(root / "outputs.safetensors")))


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--fixtures")) / NAME


@pytest.fixture(scope="module")
def config(root: Path) -> dict[str, Any]:
    return json.loads((root / "config.json").read_text())


@pytest.fixture(scope="module")
def inputs(root: Path) -> dict[str, Tensor]:
    return load_file(root / "inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(root: Path) -> dict[str, Tensor]:
    return load_file(root / "outputs.safetensors")


@pytest.fixture(scope="module")
def model(root: Path, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> LLaDA:
    folder = tmp_path_factory.mktemp(NAME)
    place, variant = re.fullmatch(r"(\S+) variant (\w+)", config["model_config"]).groups()
    tree = json.loads((root / place).read_text())["variants"][variant]
    (folder / "config.json").write_text(json.dumps(tree | {"mask_token_id": config["mask_id"]}))
    shutil.copy(root / config["weights"], folder / "model.safetensors")
    return LLaDA.from_pretrained(folder)


def losses(case: str, model: LLaDA, config: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is known of a case: pre-training, the same cut short, or fine-tuning."""
    ids, t, u = (inputs.get(f"{case}.{n}", inputs[f"pretrain.{n}"]) for n in ("input_ids", "t", "u"))
    if f"{case}.random_length" in inputs:
        ids = ids[:, : int(inputs[f"{case}.random_length"])]
    u = u[:, : ids.shape[1]]
    maskable = torch.ones_like(ids, dtype=torch.bool)
    if f"{case}.prompt_lengths" in inputs:
        maskable = torch.arange(ids.shape[1]) >= inputs[f"{case}.prompt_lengths"][:, None]
    p = masking.mask_probability(t, config["eps"])
    masked = masking.independent_mask(p, u, maskable)
    noisy = ids.masked_fill(masked, model.config.mask_id)
    # The published snippets find masks by their id, so that one that belongs to the data counts as well.
    masked = noisy == model.config.mask_id
    model.zero_grad()
    entropy = objectives.chunked_cross_entropy(model.hidden(noisy)[masked], ids[masked], model.head)
    weights = objectives.token_weights(masked, p, maskable.float())[masked]
    loss = (entropy * weights).sum() / len(ids)
    loss.backward()
    gradients = {f"grad.{k}": v.grad for k, v in model.named_parameters()}
    return {
        "noisy": noisy,
        "masked": masked,
        "p_mask": p[:, None].expand(ids.shape),
        "token_loss": (entropy / p[:, None].expand(ids.shape)[masked]).detach(),
        "answer_lengths": maskable.sum(1),
        "loss": loss.detach(),
        **gradients,
    }


def our_name(what: str) -> str:
    """The name of a gradient in our module: the fixture shortens those of the published layout."""
    if not what.startswith("grad."):
        return what
    short = re.sub(r"^block(\d+)_", r"blocks.\1.", what.removeprefix("grad."))
    return f"grad.{LAYOUTS['olmo'].keys.forward(f'model.transformer.{short}.weight')}"


def test_output_follows_its_rule(output, model, config, inputs, outputs):
    rules = [rule for pattern, rule in RULES.items() if re.fullmatch(pattern, output)]
    assert rules, f"{output} has no rule"
    case, _, what = output.partition(".")
    (absolute, relative), expected = rules[0], outputs[output]
    if what.startswith("grad."):
        absolute *= float(expected.abs().max())
    ours = losses(case, model, config, inputs)[our_name(what)]
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, atol=absolute, rtol=relative)


def test_every_input_is_used(inputs):
    assert not [n for n in inputs if not re.fullmatch(INPUTS, n)]


def test_the_loss_in_chunks_is_the_loss_at_once(model, config, inputs):
    for case in sorted({n.partition(".")[0] for n in inputs if n.endswith("input_ids")}):
        ids = inputs[f"{case}.input_ids"]
        hidden = model.hidden(ids).detach().flatten(0, 1)
        whole = objectives.chunked_cross_entropy(hidden, ids.flatten(), model.head)
        parts = objectives.chunked_cross_entropy(hidden.requires_grad_(), ids.flatten(), model.head, chunk=7)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
