"""Conditional log-likelihood against the published estimators: fixture ``llada_loglik``.

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
from safetensors.torch import load_file
from torch import Tensor

from mmdiff.diffusion.likelihood import confidence_score, log_likelihood, masked_counts, masked_loss
from mmdiff.models.llada import LLaDA
from mmdiff.pipelines import Checkpoint
from mmdiff.pipelines.scoring import answer_logits

NAME = "llada_loglik"

RULES: dict[str, tuple[float, float]] = {
    r"stratified_counts": (0, 0),
    r"\w+\.p_mask": (1e-6, 0),
    r"\w+\.batch_loss": (2e-3, 0),
    r"\w+\.log_likelihood": (1e-3, 1e-3),
    r"\w+\.confidence_(plain|pad_eos)\.(score|losses)": (1e-3, 1e-3),
    r"\w+\.confidence_(plain|pad_eos)\.order": (0, 0),
}
"""Output -> absolute and relative tolerance ("1e-3 relative to 1 or better")."""


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
def checkpoint(root: Path, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(NAME)
    place, variant = re.fullmatch(r"(\S+) variant (\w+)", config["model_config"]).groups()
    tree = json.loads((root / place).read_text())["variants"][variant]
    (folder / "config.json").write_text(json.dumps(tree | {"mask_token_id": config["mask_id"]}))
    shutil.copy(root / config["weights"], folder / "model.safetensors")
    return Checkpoint(LLaDA.from_pretrained(folder))


def counts(expected: Tensor) -> Tensor:
    """Rows ``T, b, k, x_1 .. x_b, -1 ...`` with our x."""
    rows = []
    for length, batch, first, *_ in expected.tolist():
        row = [length, batch, first, *masked_counts(first, length, batch).tolist()]
        rows.append(row + [-1] * (expected.shape[1] - len(row)))
    return torch.tensor(rows, dtype=expected.dtype)


def estimate(case: str, what: str, network: Callable[..., Any], config: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What we compute for an output of a case, from the recorded masks."""
    answer, masks = inputs[f"{case}.answer"], inputs[f"{case}.masked"]
    start = len(inputs[f"{case}.prompt"])
    assert not masks[..., :start].any()
    masks = masks[..., start:]
    options = config["cases"][case]
    assert masks.shape == (options["mc_num"] // options["batch_size"], options["batch_size"], len(answer))
    if what == "p_mask":
        return masks.sum(-1) / len(answer)
    logits = network(guidance=1 + options["cfg_scale"])
    with torch.no_grad():
        if what == "batch_loss":
            return torch.stack([masked_loss(logits(m), answer, m).mean() for m in masks])
        return torch.tensor([log_likelihood(logits, answer, list(masks))], dtype=torch.float64)


def test_output_follows_its_rule(output, checkpoint, config, inputs, outputs):
    rules = [rule for pattern, rule in RULES.items() if re.fullmatch(pattern, output)]
    assert rules, f"{output} has no rule"
    expected, (absolute, relative) = outputs[output], rules[0]
    case, _, what = output.partition(".")

    def network(**options: Any) -> Callable[[Tensor], Tensor]:
        prompt, answer = (inputs[f"{case}.{n}"].tolist() for n in ("prompt", "answer"))
        return answer_logits(checkpoint, prompt, answer, **options)

    if output == "stratified_counts":
        ours = counts(expected)
    elif what.startswith("confidence_"):
        padded = what.startswith("confidence_pad_eos")
        with torch.no_grad():
            found = confidence_score(
                network(
                    after=[config["eos_token_id"]] if padded else [], guidance=1 + config["cases"][case]["cfg_scale"]
                ),
                inputs[f"{case}.answer"],
            )
        values = {
            "losses": found.losses,
            "order": found.order.to(expected.dtype),
            "score": -found.losses.double().sum()[None],
        }
        ours = values[what.rpartition(".")[2]]
    else:
        ours = estimate(case, what, network, config, inputs)
    torch.testing.assert_close(ours, expected, atol=absolute, rtol=relative)


def test_every_input_and_every_case_is_used(config, inputs, outputs):
    assert {n.partition(".")[0] for n in inputs} == set(config["cases"])
    assert {n.partition(".")[0] for n in outputs} - {"stratified_counts"} == set(config["cases"])
    assert not [n for n in inputs if not re.fullmatch(r"\w+\.(prompt|answer|masked)", n)]
