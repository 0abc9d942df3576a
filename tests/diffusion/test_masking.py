"""The forward process: shares, counts, times."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff import rng
from mmdiff.diffusion import masking


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_exact_count_masks_the_ceiling_of_the_share_and_only_maskable_positions(seed: int, share: float) -> None:
    u = rng.uniform(rng.generator(seed, "u"), (3, 12))
    maskable = rng.uniform(rng.generator(seed, "m"), (3, 12)) < 0.6
    masked = masking.exact_count_mask(torch.full((3,), share), u, maskable)
    n = maskable.sum(1)
    expected = torch.minimum((torch.tensor(share) * n).ceil().long().clamp_min(1), n)
    assert torch.equal(masked.sum(1), expected)
    assert not (masked & ~maskable).any()


def test_independent_mask_has_probability_p() -> None:
    p = torch.tensor([0.2, 0.9])
    u = rng.uniform(rng.generator(0, "u"), (2, 20_000))
    share = masking.independent_mask(p, u, torch.ones(2, 20_000, dtype=torch.bool)).float().mean(1)
    torch.testing.assert_close(share, p, atol=0.01, rtol=0)


def test_stratified_times_cover_the_unit_interval_evenly() -> None:
    t = masking.stratified_times(rng.uniform(rng.generator(0, "t"), (8,)))
    assert sorted((t * 8).long().tolist()) == list(range(8))


def test_the_cosine_schedule_starts_with_everything_masked() -> None:
    torch.testing.assert_close(
        masking.masked_share(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([1.0, 0.5**0.5, 0.0]), atol=1e-6, rtol=0
    )


def test_a_turn_is_a_question_and_its_answer_and_sees_no_later_one() -> None:
    header, assistant, text, none = 9, 8, 3, -100
    ask, answer = [header, none, none], [header, assistant, text]
    labels = torch.tensor([[1, *ask, *ask, *answer, *ask, *answer, *answer, none, *ask], [1, *answer] + [none] * 19])
    turns = masking.dialogue_turns(labels, header, assistant)
    assert turns[0].tolist() == [0] * 10 + [1] * 10 + [2] * 3
    assert turns[1].tolist() == [0] * 23
    seen = masking.dialogue_causal(turns)
    assert seen[1].all()
    assert seen[0].sum(1).tolist() == [10] * 10 + [20] * 10 + [23] * 3
