"""The text backbone against the published code: fixture ``llada``.

Every tensor of the fixture has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdiff.io.convert import convert
from mmdiff.io.layouts import LAYOUTS
from mmdiff.models.llada import LLaDA

NAME = "llada"
ATOL = 1e-4

RULES = {
    r"logits": "tolerance",
    r"hidden\.\d+": "tolerance",
    r"padded_logits": "tolerance",
    r"padded_logits_mask_ignored": "tolerance",
    r"logits_bf16": "bound",
}
INPUTS = ("input_ids", "padded_input_ids", "attention_mask")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--fixtures")) / NAME
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", list(json.loads((root / "config.json").read_text())["variants"]))
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(root / "outputs.safetensors")))


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--fixtures")) / NAME


@pytest.fixture(scope="module")
def inputs(root: Path) -> dict[str, Tensor]:
    return load_file(root / "inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(root: Path) -> dict[str, Tensor]:
    return load_file(root / "outputs.safetensors")


@pytest.fixture(scope="module")
def publish(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Variant -> folder in the published layout."""
    made: dict[str, Path] = {}

    def folder(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp(variant)
            tree = json.loads((root / "config.json").read_text())["variants"][variant]
            (made[variant] / "config.json").write_text(json.dumps(tree))
            own = root / f"weights_{variant}.safetensors"
            shutil.copy(own if own.is_file() else root / "weights.safetensors", made[variant] / "model.safetensors")
        return made[variant]

    return folder


def run(model: LLaDA, name: str, variant: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Tensor:
    """What we compute for an output of the fixture."""
    ids = inputs.get(f"{variant}.input_ids")
    padded, mask = inputs.get(f"{variant}.padded_input_ids"), inputs.get(f"{variant}.attention_mask")
    with torch.inference_mode():
        if name in ("logits", "logits_bf16"):
            return model(ids).float()
        if name == "padded_logits":
            return model(padded, valid=mask.bool())
        if name == "padded_logits_mask_ignored":
            return model(padded)[:, -outputs[f"{variant}.{name}"].shape[1] :]
        seen: list[Tensor] = []
        hooks = [layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in model.layers]
        seen.append(model.hidden(ids))
        for hook in hooks:
            hook.remove()
        return seen[int(name.removeprefix("hidden."))]


def test_output_follows_its_rule(output, inputs, outputs, publish):
    variant, _, name = output.partition(".")
    rule = next((rule for pattern, rule in RULES.items() if re.fullmatch(pattern, name)), None)
    assert rule is not None, f"{output} has no rule"
    expected = outputs[output]
    if rule == "bound":
        exact = outputs[f"{variant}.logits"]
        ours = run(LLaDA.from_pretrained(publish(variant), dtype=torch.bfloat16), name, variant, inputs, outputs)
        theirs, mine = (expected - exact).abs(), (ours - exact).abs()
        assert mine.max() <= 2 * theirs.max()
        assert mine.mean() <= 2 * theirs.mean()
        return
    ours = run(LLaDA.from_pretrained(publish(variant)), name, variant, inputs, outputs)
    assert ours.shape == expected.shape
    if name == "padded_logits":
        real = inputs[f"{variant}.attention_mask"].bool()
        ours, expected = ours[real], expected[real]
    torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)


def test_every_input_is_used(inputs, outputs):
    variants = {name.partition(".")[0] for name in outputs}
    unknown = [n for n in inputs if n.partition(".")[0] not in variants or n.partition(".")[2] not in INPUTS]
    assert not unknown


def test_every_variant_has_outputs(variant, outputs):
    assert [n for n in outputs if n.startswith(f"{variant}.")]


def test_embeddings_and_a_mask_of_ones_change_nothing(variant, inputs, outputs, publish):
    model = LLaDA.from_pretrained(publish(variant))
    ids, expected = inputs[f"{variant}.input_ids"], outputs[f"{variant}.logits"]
    with torch.inference_mode():
        ones = model(ids, valid=torch.ones_like(ids, dtype=torch.bool))
        embedded = model(embeds=model.embed_tokens(ids))
    torch.testing.assert_close(ones, expected, atol=ATOL, rtol=0)
    torch.testing.assert_close(embedded, expected, atol=ATOL, rtol=0)


def test_padded_rows_agree_with_the_sequence_alone(variant, inputs, publish):
    if f"{variant}.padded_input_ids" not in inputs:
        return
    model = LLaDA.from_pretrained(publish(variant))
    with torch.inference_mode():
        for ids, mask in zip(
            inputs[f"{variant}.padded_input_ids"], inputs[f"{variant}.attention_mask"].bool(), strict=True
        ):
            together = model(ids[None], valid=mask[None])[0, mask]
            torch.testing.assert_close(together, model(ids[mask][None])[0], atol=ATOL, rtol=0)


def test_key_map_is_the_published_one(root):
    path = root / "key_map.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    ours = {olmo: LAYOUTS["llama"].keys.backward(str(LAYOUTS["olmo"].keys.forward(olmo))) for olmo in table}
    assert ours == table


def test_the_other_layout_computes_the_same(variant, inputs, outputs, publish, tmp_path):
    convert(publish(variant), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "llama", to="llama")
    with torch.inference_mode():
        for folder in (tmp_path / "ours", tmp_path / "llama"):
            logits = LLaDA.from_pretrained(folder)(inputs[f"{variant}.input_ids"])
            torch.testing.assert_close(logits, outputs[f"{variant}.logits"], atol=ATOL, rtol=0)
