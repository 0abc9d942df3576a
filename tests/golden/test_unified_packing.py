"""Packed text, features and latents: split masks, patches, positions and losses: fixture ``unified_packing``.

Every entry of the fixture has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmdiff.diffusion import flow, objectives
from mmdiff.nn import masks
from mmdiff.nn.patches import patch, unpatch
from mmdiff.nn.posemb import grid_rows
from tests.helpers.golden import rule

NAME = "unified_packing"

RULES = {
    r"mask\.(\d+|packed)": "exact",
    r"pos_(extrapolate|interpolate)": "exact",
    r"patchified": "exact",
    r"flow\.(t|x_t|mse)|text\.ce|loss|grad\.(logits|prediction)": "close",
}
INPUTS = r"flow\.(noise|prediction|t_raw|x0)|latent|text\.(labels|lengths|logits|p_mask|weights)"
TREE = {
    "cases", "packed", "patch_size", "pos", "loss_reduction", "timestep_shift", "ce_weight", "mse_weight"
}  # fmt: skip
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def ours(tree: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    pos = tree["pos"]
    grid = (pos["img_h"] // pos["patch_size"], pos["img_w"] // pos["patch_size"], pos["max_num_patches_per_side"])
    split_masks = {f"mask.{i}": split_mask(case) for i, case in enumerate(tree["cases"])}
    return {
        **split_masks,
        "mask.packed": split_mask(tree["packed"]),
        "patchified": patch(inputs["latent"][None], tree["patch_size"])[0],
        "pos_extrapolate": grid_rows(*grid),
        "pos_interpolate": grid_rows(*grid, interpolate=True),
        **losses(tree, inputs),
    }


def split_mask(case: dict[str, Any]) -> Tensor:
    lengths = case["split_lens"]
    made = masks.splits(lengths, case["attn_modes"], case.get("document_lens"))
    return masks.dense(made, 1, sum(lengths))[0]


def losses(tree: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    logits, prediction = (inputs[n].clone().requires_grad_() for n in ("text.logits", "flow.prediction"))
    entropy = objectives.cross_entropy(logits, inputs["text.labels"])
    ce = objectives.weighted_mean(entropy, inputs["text.weights"])
    t = flow.shifted(flow.logit_normal(inputs["flow.t_raw"]), float(tree["timestep_shift"]))
    x0, noise = inputs["flow.x0"], inputs["flow.noise"]
    rows = flow.per_sample_loss(prediction, flow.velocity(x0, noise))
    mse = objectives.weighted_mean(rows, (t > 0).float())
    loss = tree["ce_weight"] * ce + tree["mse_weight"] * mse
    loss.backward()
    return {
        "text.ce": ce.detach(),
        "flow.t": t,
        "flow.x_t": flow.noised(x0, noise, t),
        "flow.mse": mse.detach(),
        "loss": loss.detach(),
        "grad.logits": logits.grad,
        "grad.prediction": prediction.grad,
    }


def test_output_follows_its_rule(output, ours, outputs):
    kind, mine, expected = rule(RULES, output), ours[output], outputs[output]
    assert mine.dtype == expected.dtype
    assert mine.shape == expected.shape
    if kind == "exact":
        assert torch.equal(mine, expected)
    else:
        bound = TOLERANCE * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(mine, expected, atol=bound, rtol=0)


def test_every_input_and_option_is_used(inputs, tree):
    assert not [n for n in inputs if not re.fullmatch(INPUTS, n)]
    assert set(tree) == TREE


def test_nothing_is_left_out(ours, outputs):
    assert set(ours) == set(outputs)


def test_weights_of_tokens_are_those_of_their_answers(tree, inputs):
    """Tokens of an answer stand together, answers in order; how many tokens each has is not stored."""
    per_answer = objectives.length_weights(inputs["text.lengths"], inputs["text.p_mask"], tree["loss_reduction"])
    distance = (inputs["text.weights"][:, None] - per_answer).abs()
    answer = distance.argmin(1)
    assert bool((distance.amin(1) <= TOLERANCE * per_answer.max()).all())
    assert all(a <= b for a, b in pairwise(answer.tolist()))


def test_patches_go_back(inputs, tree):
    latent = inputs["latent"][None]
    rows = latent.shape[2] // tree["patch_size"]
    assert torch.equal(unpatch(patch(latent, tree["patch_size"]), rows, tree["patch_size"]), latent)


def test_cross_entropy_is_that_of_torch(inputs):
    logits, labels = inputs["text.logits"], inputs["text.labels"]
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(objectives.cross_entropy(logits, labels), expected)
