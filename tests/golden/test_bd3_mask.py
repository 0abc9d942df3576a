"""Block diffusion: attention masks, schedules, clipped intervals and the loss: fixture ``bd3_mask``.

Every entry of the fixture has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdiff import rng
from mmdiff.diffusion import block_diffusion, bounds, noise
from mmdiff.nn import masks
from tests.helpers.golden import rule

NAME = "bd3_mask"

RULES = {
    r"mask(_context_causal)?\.n\d+_b\d+": "exact",
    r"schedule\.\w+\.(loss_scale|p)": "close",
    r"\w+\.network_input": "exact",
    r"\w+\.t": "close",
    r"\w+\.nll": "weighted",
}
INPUTS = r"\w+\.u_block|\w+\.u_mask|logits|tokens|schedule\.t"
TREE = {"sizes", "batch", "num_blocks", "block_size", "vocab", "mask_id", "intervals"}
SCHEDULES = {
    "loglinear": noise.loglinear(eps=0.0),
    "square": noise.power(2.0),
    "square_root": noise.power(0.5),
    "log": noise.logarithmic(),
    "cosine": noise.uncentred_cosine(),
}
TOLERANCES = {"close": 2e-4, "weighted": 1e-3}


@pytest.fixture(scope="module")
def ours(tree: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for n, block in tree["sizes"]:
        out[f"mask.n{n}_b{block}"] = masks.dense(masks.block_diffusion(n, block), 1, 2 * n)[0]
        causal = masks.block_diffusion(n, block, context="causal")
        out[f"mask_context_causal.n{n}_b{block}"] = masks.dense(causal, 1, 2 * n)[0]
    for name, schedule in SCHEDULES.items():
        out[f"schedule.{name}.p"] = schedule.share(inputs["schedule.t"])
        # Published scales are factors of log-probabilities, ours of cross-entropies.
        out[f"schedule.{name}.loss_scale"] = -schedule.weight(inputs["schedule.t"])
    for name, interval in tree["intervals"].items():
        out |= {f"{name}.{k}": v for k, v in loss(tree, inputs, name, interval).items()}
    # The first position of the unclipped interval kept clean.
    name = next(n for n, (low, high) in tree["intervals"].items() if low <= 1e-3 and high == 1)
    kept = loss(tree, inputs, name, tree["intervals"][name], keep=1)
    return out | {f"ignore_bos.{k}": kept[k] for k in ("network_input", "nll")}


def loss(tree: Any, inputs: dict[str, Tensor], name: str, interval: list[float], keep: int = 0) -> dict[str, Tensor]:
    tokens, size = inputs["tokens"], tree["block_size"]
    schedule, bounds_of_t = SCHEDULES["loglinear"], (float(interval[0]), float(interval[1]))
    t = block_diffusion.block_times(inputs[f"{name}.u_block"], bounds_of_t)
    tape = rng.Tape(inputs[f"{name}.u_mask"])
    masked = block_diffusion.clipped_mask(schedule.share(t), tokens.shape[1], size, bounds_of_t, tape)
    masked[:, :keep] = False
    noisy = tokens.masked_fill(masked, tree["mask_id"])
    log_probs = bounds.subs(inputs["logits"], noisy, tree["mask_id"])
    entropy = -log_probs.gather(-1, tokens[..., None])[..., 0]
    weight = block_diffusion.weights(schedule, t, bounds_of_t).repeat_interleave(size, dim=1)
    return {
        "t": t.repeat_interleave(size, dim=1),
        "network_input": torch.cat([noisy, tokens], 1),
        "nll": entropy * weight,
    }


def test_output_follows_its_rule(output, ours, outputs):
    kind, mine, expected = rule(RULES, output), ours[output], outputs[output]
    assert mine.dtype == expected.dtype
    assert mine.shape == expected.shape
    if kind == "exact":
        assert torch.equal(mine, expected)
    else:
        bound = TOLERANCES[kind] * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(mine, expected, atol=bound, rtol=0)


def test_every_input_and_option_is_used(inputs, tree):
    assert not [n for n in inputs if not re.fullmatch(INPUTS, n)]
    assert {n.split(".")[0] for n in inputs if n.endswith(".u_block")} == set(tree["intervals"])
    assert set(tree) == TREE


def test_sizes_are_those_of_the_configuration(tree, inputs):
    batch, blocks, block = tree["batch"], tree["num_blocks"], tree["block_size"]
    assert inputs["tokens"].shape == (batch, blocks * block)
    assert inputs["logits"].shape == (batch, blocks * block, tree["vocab"])


def test_every_recorded_round_is_used(tree, inputs):
    """A round too few would leave draws on the tape, one too many ask for another."""
    for name, (low, high) in tree["intervals"].items():
        low, high = float(low), float(high)
        t = block_diffusion.block_times(inputs[f"{name}.u_block"], (low, high))
        tape = rng.Tape(inputs[f"{name}.u_mask"])
        length = tree["num_blocks"] * tree["block_size"]
        block_diffusion.clipped_mask(t, length, tree["block_size"], (low, high), tape)
        with pytest.raises(ValueError, match="one more"):
            tape.play((tree["batch"], length))


def test_masked_shares_stay_within_the_interval(tree, ours):
    for name, (low, high) in tree["intervals"].items():
        noisy = ours[f"{name}.network_input"][:, : tree["num_blocks"] * tree["block_size"]]
        share = (noisy == tree["mask_id"]).float().unflatten(1, (-1, tree["block_size"])).mean(-1)
        assert bool((share >= (low if low > 1e-3 else 0)).all())
        assert bool((share <= high).all())
