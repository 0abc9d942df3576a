"""Complementary masking (LaViDa) and certainty forcing (dParallel): fixture ``complementary_losses``.

Every entry of the fixture has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdiff.batch import IGNORE
from mmdiff.diffusion import certainty, flow, masking, objectives
from tests.helpers.golden import rule

NAME = "complementary_losses"

RULES = {
    r"compl\.\w+\.masked|compl\.labels|certainty_\w+\.noisy": "exact",
    r"compl\.\w+\.p_mask|(compl|certainty_\w+)\.(loss|grad)": "close",
}
INPUTS = (
    r"compl\.(labels|u_t|u_mask|normal_t|logits|logit_normal\.u_mask)"
    r"|certainty_(llada|dream)\.(ids|logits|u_mask)|certainty_llada\.num_clean_blocks"
)
TREE = {"batch", "length", "vocab", "mask_id", "eos_id", "fim_id", "eps", "mode_scale", "certainty"}
CERTAINTY = {"length", "prompt_length", "block_size", "mask_ratio", "temperature", "weight_llada", "weight_dream"}
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def ours(tree: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**complementary(tree, inputs), **forced("llada", tree, inputs), **forced("dream", tree, inputs)}


def complementary(tree: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    times = {
        "uniform": inputs["compl.u_t"],
        "logit_normal": flow.logit_normal(inputs["compl.normal_t"]),
        "mode": flow.mode(inputs["compl.u_t"], float(tree["mode_scale"])),
    }
    out = {}
    for policy, t in times.items():
        u = inputs.get(f"compl.{policy}.u_mask", inputs["compl.u_mask"])
        p = masking.mask_probability(t, float(tree["eps"]))
        out |= {f"compl.{policy}.p_mask": p, f"compl.{policy}.masked": masking.at_least_one_mask(p, u)}
    given = inputs["compl.labels"]
    labels = masking.complementary_labels(given, out["compl.uniform.masked"], given == tree["fim_id"])
    logits = inputs["compl.logits"].clone().requires_grad_()
    learnt = labels != IGNORE
    loss = objectives.mean_of(objectives.cross_entropy(logits[learnt], labels[learnt]))
    loss.backward()
    return out | {"compl.labels": labels, "compl.loss": loss.detach(), "compl.grad": logits.grad}


def forced(name: str, tree: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss of both copies. Dream predicts a position from the one before it, and its answer is one block."""
    key, options = f"certainty_{name}", tree["certainty"]
    ids, given = inputs[f"{key}.ids"], inputs[f"{key}.logits"].clone().requires_grad_()
    block = options["block_size"] if name == "llada" else None
    clean = inputs.get(f"{key}.num_clean_blocks", torch.tensor(0)).view(1)
    answer = (torch.arange(ids.shape[1]) >= options["prompt_length"])[None]
    # Uniforms are stored for the block in question alone.
    first = options["prompt_length"] + int(clean) * (block or 0)
    u = torch.zeros(ids.shape)
    u[:, first : first + inputs[f"{key}.u_mask"].shape[1]] = inputs[f"{key}.u_mask"]
    two = certainty.halves(answer, clean, u, block=block, share=float(options["mask_ratio"]), eps=float(tree["eps"]))
    logits = torch.cat([given[:, :1], given[:, :-1]], 1) if name == "dream" else given
    both = ids.repeat(2, 1)
    loss = torch.zeros(())
    for half in range(2):
        learnt = two.learnt[half]
        rows, labels = logits[half][learnt], both[half][learnt]
        sure = certainty.right_entropy(rows, labels, float(options["temperature"]))
        loss = loss + objectives.mean_of(objectives.cross_entropy(rows, labels)) + options[f"weight_{name}"] * sure
    loss.backward()
    noisy = both.masked_fill(two.hidden, tree["mask_id"])
    return {f"{key}.noisy": noisy, f"{key}.loss": loss.detach(), f"{key}.grad": given.grad}


def test_output_follows_its_rule(output, ours, outputs):
    kind, mine, expected = rule(RULES, output), ours[output], outputs[output]
    assert mine.dtype == expected.dtype
    assert mine.shape == expected.shape
    if kind == "exact":
        assert torch.equal(mine, expected)
    else:
        scale = float(expected.abs().max()) if output.endswith("grad") else max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(mine, expected, atol=TOLERANCE * scale + 1e-9, rtol=0)


def test_every_input_and_option_is_used(inputs, tree):
    assert not [n for n in inputs if not re.fullmatch(INPUTS, n)]
    assert set(tree) == TREE
    assert set(tree["certainty"]) == CERTAINTY


def test_nothing_is_left_out(ours, outputs):
    assert set(ours) == set(outputs)


def test_every_answer_token_is_learnt_in_exactly_one_copy(tree, inputs, ours):
    given = inputs["compl.labels"]
    first, second = (ours["compl.labels"] != IGNORE).chunk(2)
    answer = (given != IGNORE) & (given != tree["fim_id"])
    assert torch.equal(first ^ second, answer)
    assert not bool((first & second).any())
