"""LLaDA's published sampler and Fast-dLLM's, canvas by canvas: fixture ``llada_generate``.

``generate`` with a ``forwards`` field is LLaDA's loop, which always does all its passes: ``compat="reference"``. The
``fast_*`` cases are Fast-dLLM's loops, which leave a block with its last mask.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmdiff.models.llada import LLaDA
from mmdiff.sampling import Dual, Fixed, Greedy, Linear, Prefix, Threshold, layout
from mmdiff.sampling import decode as decode_tokens
from mmdiff.sampling.presets import text_parts
from tests.helpers.golden import publish, root_of, rule, tree_of

NAME, WEIGHTS = "llada_generate", "llada"
RULES = {
    r".*\.(trace|final|nfe)": "exact",
    r"num_transfer_tokens_table": "exact",
}
OPTIONS = {
    "function",
    "temperature",
    "remasking",
    "uses_attention_mask",
    "gen_length",
    "block_length",
    "steps",
    "cfg_scale",
    "logits_eos_inf",
    "confidence_eos_eot_inf",
    "threshold",
}
MEASURED = {"forwards", "nfe", "min_confidence_gap", "min_argmax_margin", "min_threshold_margin"}
CACHES = {
    "generate": None,
    "generate_with_prefix_cache": Prefix(),
    "generate_with_dual_cache": Dual(),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(tree_of(metafunc.config, NAME)["cases"]))


@pytest.fixture(scope="module")
def golden(request, tmp_path_factory):
    root, tree = root_of(request.config, NAME), tree_of(request.config, NAME)
    where = root / tree["weights"]
    variant = tree["model_config"].rpartition(" ")[2]
    config = tree_of(request.config, WEIGHTS)["variants"][variant]
    folder = publish(tmp_path_factory.mktemp(NAME), config, where)
    inputs, outputs = load_file(root / "inputs.safetensors"), load_file(root / "outputs.safetensors")
    return tree, LLaDA.from_pretrained(folder).eval(), inputs, outputs


def parts(tree: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    eos, eot = tree["eos_token_id"], tree["eot_token_id"]
    if "forwards" in case:
        words = {k: case[k] for k in ("gen_length", "block_length", "steps", "cfg_scale", "temperature") if k in case}
        return text_parts(
            compat="reference",
            end_ids=(eos, eot),
            remasking=case["remasking"],
            forbid=(eos,) if case.get("logits_eos_inf") else (),
            postpone=(eos, eot) if case.get("confidence_eos_eot_inf") else (),
            **words,
        ).arguments()
    who = {"schedule": Linear(case["steps"])}
    if case.get("threshold") is not None:
        who = {"selector": Threshold(case["threshold"])}
    cache = CACHES[case["function"]]
    return {"blocks": Fixed(case["block_length"]), "sampler": Greedy(torch.float64), "cache": cache, **who}


def test_case_goes_through_the_published_canvases(golden, case):
    tree, model, inputs, outputs = golden
    options = tree["cases"][case]
    assert not set(options) - OPTIONS - MEASURED, "an option without a meaning here"
    assert options.get("temperature", 0) == 0, "random numbers are not recorded"
    prompt = inputs[f"{case}.prompt"]
    mask = inputs.get(f"{case}.attention_mask", torch.ones_like(prompt)).bool()
    rows = [p[m].tolist() for p, m in zip(prompt, mask, strict=True)]
    canvas = layout(rows, [[None] * options["gen_length"]] * len(rows), mask_id=tree["mask_id"])
    real = canvas.valid
    history = [canvas.tokens]
    done = decode_tokens(
        model,
        canvas=canvas,
        callback=lambda step: history.append(step.canvas.tokens.clone()),
        **parts(tree, options),
    )
    assert torch.equal(done.canvas.tokens[real], outputs[f"{case}.final"][real])
    assert done.trace.nfe == options.get("forwards", options.get("nfe"))
    if f"{case}.trace" in outputs:
        expected = outputs[f"{case}.trace"].long()
        assert torch.equal(torch.stack(history)[:, real], expected[:, real])
    if f"{case}.nfe" in outputs:
        assert done.trace.nfe == int(outputs[f"{case}.nfe"])


def test_numbers_of_tokens_per_step_are_the_published_ones(golden):
    table = golden[3]["num_transfer_tokens_table"].tolist()
    for masks, steps, *counts in table:
        assert Linear(steps, published=True).counts(masks, steps) == counts[:steps]
        assert set(counts[steps:]) <= {-1}


def test_every_entry_has_a_rule_and_a_case(golden):
    tree, _, inputs, outputs = golden
    assert not set(tree) - {"mask_id", "eos_token_id", "eot_token_id", "weights", "model_config", "cases"}
    assert {rule(RULES, name) for name in outputs}
    assert {n.partition(".")[2] for n in inputs} <= {"prompt", "attention_mask"}
    assert {n.partition(".")[0] for n in inputs} == set(tree["cases"])
    assert {n.partition(".")[0] for n in outputs} - {"num_transfer_tokens_table"} == set(tree["cases"])
