"""The schedules and forms of the bound agree with each other; blocks keep within their interval."""

from __future__ import annotations

import pytest
import torch

from mmdiff import rng
from mmdiff.diffusion import block_diffusion, bounds, certainty, masking, noise, objectives

LENGTH = 5


@pytest.mark.parametrize("name", noise.NOISES)
def test_every_schedule_gives_the_same_bound(name):
    """The expected weight of a mask of k positions is an integral over the share alone, whatever the schedule.

    A share with a floor adds what lies below it.
    """
    gamma = noise.NOISES[name]
    t = torch.linspace(1e-4, 1, 200_001, dtype=torch.float64)
    p = gamma.share(t)
    share = torch.linspace(float(p[0]), float(p[-1]), 200_001, dtype=torch.float64)
    for k in range(1, LENGTH + 1):
        chance = p**k * (1 - p) ** (LENGTH - k)
        over_t = torch.trapezoid(gamma.weight(t) * chance, t)
        over_share = torch.trapezoid(share ** (k - 1) * (1 - share) ** (LENGTH - k), share)
        assert float(over_t) == pytest.approx(float(over_share), rel=3e-3, abs=1.1e-3)


def test_shares_of_constant_weight_are_those_of_importance_sampling():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    share, weight = noise.constant_weight(u)
    torch.testing.assert_close(noise.loglinear().share(noise.equal_weight_times(u)), share)
    assert weight == pytest.approx(-torch.log(share[0]).item())


def test_score_entropy_and_cross_entropy_have_the_same_value_and_gradient_up_to_a_constant():
    """The scores of a normalised network sum to a constant, so only the true token's score is left."""
    logits = rng.normal(rng.generator(0), (3, LENGTH, 7)).double().requires_grad_()
    ids = (rng.uniform(rng.generator(1), (3, LENGTH)) * 7).long()
    masked = rng.uniform(rng.generator(2), (3, LENGTH)) < 0.5
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    log_probs = logits.log_softmax(-1)
    entropy = -log_probs.gather(-1, ids[..., None])[..., 0]
    score = bounds.t_dse(log_probs, ids, masked, noise.loglinear(), t)
    plain = bounds.masked_sum(entropy, masked, noise.loglinear().weight(t))
    torch.testing.assert_close(score, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (score, plain)))


def test_spread_times_cover_the_interval_evenly():
    t = masking.spread_times(rng.uniform(rng.generator(0), (4, 3)))
    assert (t * 12).long().flatten().tolist() == list(range(12))


def test_steps_end_at_one_and_never_start_at_zero():
    t = bounds.step_times(torch.tensor([0.0, 0.2499, 0.25, 0.999]), 4)
    assert t.tolist() == [0.25, 0.25, 0.5, 1.0]


def test_a_row_without_masks_costs_nothing():
    masked = torch.zeros(2, LENGTH, dtype=torch.bool)
    assert bounds.count_weight(masked).tolist() == [0, 0]
    assert bounds.masked_sum(torch.ones(2, LENGTH), masked, torch.ones(2)).tolist() == [0, 0]


def test_at_least_one_position_is_masked():
    u = rng.uniform(rng.generator(0), (8, LENGTH))
    assert masking.at_least_one_mask(torch.zeros(8), u).sum(1).tolist() == [1] * 8


def test_shares_of_blocks_stay_within_the_interval_even_in_a_short_last_block():
    p = torch.full((16, 3), 0.5)
    masked = block_diffusion.clipped_mask(p, 10, 4, (0.3, 0.8), rng.generator(0))
    for block in masked.split(4, dim=1):
        share = block.float().mean(1)
        assert bool(((share >= 0.3) & (share <= 0.8)).all())


def test_a_block_too_short_for_any_count_keeps_its_mask():
    masked = block_diffusion.clipped_mask(torch.full((4, 2), 0.5), 5, 4, (0.3, 0.8), rng.generator(0))
    assert masked.shape == (4, 5)


def test_certainty_walks_the_answer_by_blocks_and_learns_each_token_once():
    answer = torch.tensor([[0, 1, 1, 0, 1, 1, 1]]).bool()
    u = rng.uniform(rng.generator(0), (1, 7))
    for clean, current in ((0, [1, 2]), (1, [4, 5]), (2, [6])):
        two = certainty.halves(answer, torch.tensor([clean]), u, block=2)
        first, second = two.learnt
        assert (first ^ second).nonzero().flatten().tolist() == current
        later = [i for i in (1, 2, 4, 5, 6) if i > current[-1]]
        assert (two.hidden & ~two.learnt)[0].nonzero().flatten().tolist() == later
    assert not bool(certainty.halves(answer, torch.tensor([3]), u, block=2).hidden.any())


def test_only_right_predictions_are_pressed_for_certainty():
    logits = torch.tensor([[4.0, 0.0], [4.0, 0.0]], requires_grad=True)
    certainty.right_entropy(logits, torch.tensor([0, 1])).backward()
    assert logits.grad is not None
    assert bool((logits.grad[0] != 0).all())
    assert logits.grad[1].tolist() == [0, 0]
    assert float(certainty.right_entropy(logits.detach()[:0], torch.zeros(0, dtype=torch.long))) == 0


def test_means_of_nothing_are_zero():
    empty = torch.zeros(0)
    assert float(objectives.mean_of(empty)) == 0
    assert float(objectives.weighted_mean(empty, empty)) == 0


@pytest.mark.parametrize(("rule", "expected"), [("token", 1.0), ("square", 0.5), ("sample", 0.25)])
def test_weights_of_answers_by_length(rule, expected):
    assert objectives.length_weights(torch.tensor([4]), torch.tensor([0.5]), rule).tolist() == [2 * expected]
