"""The bound of masked diffusion in its published forms: fixture ``radd_losses``.

Every entry of the fixture has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdiff.diffusion import bounds, masking, noise
from mmdiff.diffusion.mask_schedules import Gamma
from tests.helpers.golden import rule

NAME = "radd_losses"

RULES = {
    r"log_c|mdlm\.subs_log_probs": "close",
    r"(loglinear|geometric)\.(t|sigma|dsigma)|lambda\.lambda": "close",
    r"(loglinear|geometric)\.t_D[SC]E|k_DCE|smdm\.loss|mdlm\.\w+\.nll": "weighted",
    r"(loglinear|geometric|lambda|k|smdm|mdlm\.\w+)\.masked": "exact",
    # Divided in float64, but the cross-entropies are those of float32 logits.
    r"lambda_DCE": "weighted",
    r"toy\.(ar_forward|ar_backward|ar_one_order|exact_bound)": "double",
}
TOLERANCES = {"close": 2e-4, "weighted": 1e-3, "double": 1e-8}
INPUTS = (
    r"(loglinear|geometric)\.u0|(loglinear|geometric|lambda|mdlm|smdm)\.u_mask|lambda\.u|(mdlm|smdm)\.u_t"
    r"|k\.(k|perm)|tokens|raw_logits|toy\.(U|P|W|tokens|one_order)"
)
TREE = {
    "batch", "length", "vocab", "mask_id", "token_dim", "sampling_eps", "loglinear_eps", "geometric",
    "mdlm_discrete_T", "toy_length",
}  # fmt: skip


@pytest.fixture(scope="module")
def ours(tree: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    log_c = bounds.drop_mask(inputs["raw_logits"], tree["mask_id"])
    entropy = -log_c.gather(-1, inputs["tokens"][..., None])[..., 0]
    return {
        "log_c": log_c,
        **timed("loglinear", noise.loglinear(float(tree["loglinear_eps"])), tree, inputs, log_c, entropy),
        **timed("geometric", geometric(tree), tree, inputs, log_c, entropy),
        **shares(inputs, entropy),
        **mdlm(tree, inputs),
        **smdm(tree, inputs),
        **toy(tree, inputs),
    }


def geometric(tree: dict[str, Any]) -> Gamma:
    return noise.geometric(float(tree["geometric"]["sigma_min"]), float(tree["geometric"]["sigma_max"]))


def timed(
    name: str, schedule: Gamma, tree: Any, inputs: dict[str, Tensor], log_c: Tensor, entropy: Tensor
) -> dict[str, Tensor]:
    t = masking.stratified_times(inputs[f"{name}.u0"].expand(len(entropy)))
    t = masking.mask_probability(t, float(tree["sampling_eps"]))
    masked = inputs[f"{name}.u_mask"] < schedule.share(t)[:, None]
    real = log_c[..., : tree["vocab"]]
    return {
        f"{name}.t": t,
        f"{name}.sigma": noise.sigma(schedule, t),
        f"{name}.dsigma": noise.rate(schedule, t),
        f"{name}.masked": masked,
        f"{name}.t_DCE": bounds.t_dce(entropy, masked, schedule, t),
        f"{name}.t_DSE": bounds.t_dse(real, inputs["tokens"], masked, schedule, t),
    }


def shares(inputs: dict[str, Tensor], entropy: Tensor) -> dict[str, Tensor]:
    share = masking.spread_times(inputs["lambda.u"])
    by_share = inputs["lambda.u_mask"] < share[:, None]
    by_count = inputs["k.perm"] < inputs["k.k"][:, None]
    return {
        "lambda.lambda": share,
        "lambda.masked": by_share,
        "lambda_DCE": bounds.masked_sum(entropy.double(), by_share, 1 / share.double()),
        "k.masked": by_count,
        "k_DCE": bounds.masked_sum(entropy, by_count, bounds.count_weight(by_count)),
    }


def mdlm(tree: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    eps, steps = float(tree["loglinear_eps"]), tree["mdlm_discrete_T"]
    t = masking.mask_probability(masking.spread_times(inputs["mdlm.u_t"]), float(tree["sampling_eps"]))
    line = noise.loglinear(eps)
    rough, even = bounds.step_times(t, steps), noise.equal_weight_times(t, eps)
    changed, constant = noise.constant_weight(t, eps)
    cases = {
        "loglinear": (line.share(t), line.weight(t)),
        "cosine": (noise.cosine().share(t), noise.cosine().weight(t)),
        "cosinesqr": (noise.cosine_squared().share(t), noise.cosine_squared().weight(t)),
        "importance": (line.share(even), torch.full_like(t, constant)),
        "change_of_variables": (changed, torch.full_like(t, constant)),
        "discrete": (line.share(rough), 1 / rough),
    }
    out = {}
    for case, (share, weight) in cases.items():
        noisy = inputs["tokens"].masked_fill(inputs["mdlm.u_mask"] < share[:, None], tree["mask_id"])
        log_probs = bounds.subs(inputs["raw_logits"], noisy, tree["mask_id"])
        if case == "loglinear":
            out["mdlm.subs_log_probs"] = log_probs
        out[f"mdlm.{case}.masked"] = noisy == tree["mask_id"]
        out[f"mdlm.{case}.nll"] = -log_probs.gather(-1, inputs["tokens"][..., None])[..., 0] * weight[:, None]
    return out


def smdm(tree: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    p = masking.mask_probability(inputs["smdm.u_t"], float(tree["sampling_eps"]))
    masked = masking.independent_mask(p, inputs["smdm.u_mask"], torch.ones_like(inputs["tokens"], dtype=torch.bool))
    logits = inputs["raw_logits"].flatten(0, 1)
    entropy = torch.nn.functional.cross_entropy(logits, inputs["tokens"].flatten(), reduction="none").view(
        p.numel(), -1
    )
    return {"smdm.masked": masked, "smdm.loss": bounds.masked_sum(entropy, masked, 1 / p).sum() / masked.numel()}


def toy_logits(inputs: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The toy network of the fixture's README."""
    u, p, w = (inputs[f"toy.{n}"] for n in "UPW")
    return lambda x: u[x] + p[: x.shape[1]] + w[x].mean(1, keepdim=True)


def toy(tree: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids, logits, length = inputs["toy.tokens"], toy_logits(inputs), tree["toy_length"]
    assert ids.shape[1] == length

    def along(order: Tensor) -> Tensor:
        return bounds.any_order(logits, ids, order, tree["mask_id"])

    orders = [torch.tensor(order) for order in itertools.permutations(range(length))]
    return {
        "toy.ar_forward": along(torch.arange(length)),
        "toy.ar_backward": along(torch.arange(length).flip(0)),
        "toy.ar_one_order": along(inputs["toy.one_order"]),
        "toy.exact_bound": torch.stack([along(order) for order in orders]).mean(0),
    }


def test_output_follows_its_rule(output, ours, outputs):
    kind, mine, expected = rule(RULES, output), ours[output], outputs[output]
    assert mine.dtype == expected.dtype
    assert mine.shape == expected.shape
    if kind == "exact":
        assert torch.equal(mine, expected)
        return
    # Entries of -1e6 stand for "never": what counts is the size of the others.
    bound = TOLERANCES[kind] * max(1.0, float(expected[expected > -1e5].abs().max()))
    never = expected < -1e5
    assert bool((mine[never] < -1e5).all())
    torch.testing.assert_close(mine[~never], expected[~never], atol=bound, rtol=0)


def test_every_input_and_option_is_used(inputs, tree):
    assert not [n for n in inputs if not re.fullmatch(INPUTS, n)]
    assert set(tree) == TREE


def test_nothing_is_left_out(ours, outputs):
    assert set(ours) == set(outputs)


def test_the_expectations_of_lambda_dce_and_k_dce_are_the_average_over_orders(tree, inputs, outputs):
    """All masks of the toy sequence, each with its probability."""
    ids, logits, length = inputs["toy.tokens"], toy_logits(inputs), tree["toy_length"]
    by_count, by_share = torch.zeros(2, len(ids), dtype=torch.float64)
    for places in itertools.product([False, True], repeat=length):
        k = sum(places)
        if k == 0:
            continue
        masked = torch.tensor(places).expand_as(ids)
        log_c = bounds.drop_mask(logits(ids.masked_fill(masked, tree["mask_id"])), tree["mask_id"])
        entropy = -log_c.gather(-1, ids[..., None])[..., 0]
        weight = bounds.count_weight(masked, torch.float64)
        by_count += bounds.masked_sum(entropy, masked, weight) / length / math.comb(length, k)
        # The integral of share^k (1 - share)^(L - k) / share over shares, in closed form.
        mass = math.gamma(k) * math.gamma(length - k + 1) / math.gamma(length + 1)
        by_share += bounds.masked_sum(entropy, masked, torch.full((len(ids),), mass, dtype=torch.float64))
    torch.testing.assert_close(by_count, outputs["toy.exact_bound"], atol=1e-8, rtol=0)
    torch.testing.assert_close(by_share, outputs["toy.exact_bound"], atol=1e-8, rtol=0)
