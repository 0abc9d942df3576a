"""Laws of the parts: selectors, schedules, samplers; and presets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff import rng
from mmdiff.errors import ConfigError
from mmdiff.models.llada import Config
from mmdiff.sampling import (
    CertaintyDensity,
    Cosine,
    Credit,
    Dual,
    Energy,
    Entropy,
    EntropyBound,
    EntropyThreshold,
    Eos,
    Expected,
    Factor,
    Fixed,
    Gumbel,
    Hierarchy,
    Linear,
    LocalLeap,
    Margin,
    Multinomial,
    Proposal,
    Random,
    RandomTopK,
    Shift,
    Threshold,
    ThresholdOrQuota,
    TopConfidence,
)
from mmdiff.sampling.presets import image_parts, text_parts
from mmdiff.sampling.samplers import Draw, keep_likely
from mmdiff.sampling.schedules import share_steps
from mmdiff.sampling.selectors import Turn

SELECTORS = [
    TopConfidence(),
    TopConfidence(published_ties=True),
    Margin(),
    Entropy(),
    Random(),
    RandomTopK(1.0),
    RandomTopK(2.0, "compound"),
    RandomTopK(0.5, "constant"),
    Threshold(0.3),
    Threshold(0.3, slack=1e-3),
    Factor(1.0),
    Factor(1.0, published="fast_dllm"),
    Factor(0.5, published="llada_v"),
    EntropyThreshold(0.5),
    EntropyBound(0.3),
    LocalLeap(0.6, radius=1, relaxed=0.3),
    Hierarchy(0.6, 0.3),
    Hierarchy(None, None),
    ThresholdOrQuota(0.5),
    CertaintyDensity(2.0),
    Credit(Threshold(0.4)),
]


def proposal(logits):
    tokens = logits.argmax(-1)
    return Proposal(tokens, tokens, logits, torch.arange(logits.shape[1]).expand(logits.shape[:2]))


def turn(quota, rows, width, seed=0):
    draw = Draw([rng.generator(seed + r) for r in range(rows)], [width] * rows, width, torch.device("cpu"))
    return Turn(list(range(rows)), quota, [1] * rows, [4] * rows, draw, torch.ones(rows, width, dtype=torch.bool))


@st.composite
def situations(draw):
    rows, width, classes = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(2, 6))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    logits = torch.randn(rows, width, classes, generator=gen) * draw(st.sampled_from([0.0, 1.0, 40.0]))
    candidates = torch.rand(rows, width, generator=gen) < 0.6
    quota = torch.tensor([draw(st.integers(1, width)) for _ in range(rows)])
    return logits, candidates, torch.minimum(quota, candidates.sum(1)), gen


@settings(max_examples=60, deadline=None)
@given(situation=situations(), selector=st.sampled_from(SELECTORS))
def test_a_selector_takes_candidates_only_and_at_least_one_or_exactly_the_quota(situation, selector):
    logits, candidates, quota, _ = situation
    taken = selector.select(proposal(logits), candidates, turn(quota, *candidates.shape))
    assert not (taken & ~candidates).any()
    if selector.counts:
        assert torch.equal(taken.sum(1), quota)
    else:
        assert torch.equal(taken.any(1), candidates.any(1))


@settings(max_examples=40, deadline=None)
@given(situation=situations(), selector=st.sampled_from(SELECTORS))
def test_a_selector_treats_rows_alike(situation, selector):
    logits, candidates, quota, gen = situation
    rows, width = candidates.shape
    order = torch.randperm(rows, generator=gen)

    def select(places):
        draw = Draw([rng.generator(int(r)) for r in places], [width] * rows, width, torch.device("cpu"))
        where = Turn(
            places.tolist(), quota[places], [1] * rows, [4] * rows, draw, torch.ones(rows, width, dtype=torch.bool)
        )
        return selector.select(proposal(logits[places]), candidates[places], where)

    assert torch.equal(select(torch.arange(rows))[order], select(order))


def test_of_equal_candidates_the_lower_slot_goes_first():
    logits = torch.zeros(1, 6, 3)
    candidates = torch.tensor([[False, True, True, False, True, True]])
    for selector in (TopConfidence(), Margin(), Entropy()):
        taken = selector.select(proposal(logits), candidates, turn(torch.tensor([2]), 1, 6))
        assert taken.tolist() == [[False, True, True, False, False, False]]
        wide = selector.select(
            proposal(torch.zeros(1, 500, 3)), torch.ones(1, 500).bool(), turn(torch.tensor([7]), 1, 500)
        )
        assert wide[0].nonzero().flatten().tolist() == list(range(7)), "the sort is not stable"


def test_confidence_keeps_the_order_of_float64_where_float32_probabilities_are_all_one():
    logits = torch.tensor([[[30.0, 0, 0], [33.0, 0, 0], [31.0, 0, 0], [32.0, 0, 0]]])
    assert (logits.softmax(-1)[..., 0] == 1).all()
    taken = TopConfidence().select(proposal(logits), torch.ones(1, 4, dtype=torch.bool), turn(torch.tensor([1]), 1, 4))
    assert taken.tolist() == [[False, True, False, False]]


def test_statistics_of_a_proposal_equal_their_definitions():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = proposal(logits)
    prob = logits.softmax(-1)
    top = prob.sort(-1, descending=True).values
    assert torch.allclose(p.confidence, top[..., 0], atol=1e-12)
    assert torch.allclose(p.log_prob, top[..., 0].log(), atol=1e-12)
    assert torch.allclose(p.margin, top[..., 0] - top[..., 1], atol=1e-12)
    assert torch.allclose(p.entropy, -(prob * prob.log()).sum(-1), atol=1e-12)


def test_factor_takes_the_longest_prefix_that_its_bound_allows():
    confidence = torch.tensor([0.99, 0.8, 0.74, 0.9])
    logits = torch.stack((confidence.log(), (1 - confidence).log()), -1)[None].double()
    everything = torch.ones(1, 4, dtype=torch.bool)
    # (n+1)(1-c): 0.02, 0.3, 0.8, 1.3 for the four by falling confidence.
    taken = Factor(1.0).select(proposal(logits), everything, turn(None, 1, 4))
    assert taken.tolist() == [[True, True, False, True]]
    assert Factor(1e-9).select(proposal(logits), everything, turn(None, 1, 4)).sum() == 1
    assert Factor(5.0).select(proposal(logits), everything, turn(None, 1, 4)).all()


@settings(max_examples=60, deadline=None)
@given(masks=st.integers(1, 300), steps=st.integers(1, 40))
def test_a_schedule_decides_every_slot_in_at_most_its_steps(masks, steps):
    for schedule in (Linear(steps), Cosine(steps), Shift(steps), Shift(steps, 1 / 3)):
        counts = schedule.counts(masks, steps)
        assert sum(counts) == masks
        assert all(c >= 1 for c in counts)
        assert len(counts) <= steps


def test_schedules_have_the_published_counts():
    assert Linear(3).counts(5, 3) == [2, 2, 1]
    # Kept after each pass for 256 codes in 12 steps, MMaDA.
    assert Cosine(12).counts(256, 12) == [3, 6, 11, 15, 18, 22, 26, 28, 30, 31, 33, 33]
    # float32 floors 1024 cos(pi/3) to 511.
    assert sum(Cosine(15).counts(1024, 15)[:10]) == 1024 - 511
    # MAR takes the cosine in float64, which keeps 128 of 256 when two thirds of the steps are done.
    assert sum(Cosine(12, precision="float64").counts(256, 12)[:8]) == 256 - 128
    assert sum(Cosine(12).counts(256, 12)[:8]) == 256 - 127
    assert Shift(12).counts(32, 12) == [1, 1, 2, 1, 2, 1, 3, 2, 3, 4, 6, 6]
    assert share_steps(10, 4) == [3, 3, 2, 2]


@pytest.mark.parametrize("sampler", [Multinomial(1.5), Gumbel(1.5)])
def test_a_sampler_draws_from_the_tempered_distribution(sampler):
    logits = torch.tensor([0.0, 1.0, -1.0, -torch.inf]).to(sampler.dtype)
    n = 20_000
    draw = Draw([rng.generator(1)], [n], n, torch.device("cpu"))
    drawn = sampler.choose(logits.expand(1, n, 4), draw).flatten()
    counts = torch.bincount(drawn, minlength=4)
    expected = (logits / 1.5).softmax(-1).double() * n
    assert counts[3] == 0
    assert ((counts[:3] - expected[:3]).abs() < 4 * expected[:3].sqrt()).all()


def test_cutting_keeps_the_likely_classes():
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
    assert keep_likely(logits, 2, None).isfinite().tolist() == [[[True, True, False, False]]]
    assert keep_likely(logits, None, 0.6).isfinite().tolist() == [[[True, False, False, False]]]
    assert keep_likely(logits, None, 0.7).isfinite().tolist() == [[[True, True, False, False]]]
    assert keep_likely(logits, 100, 1.0).isfinite().all()


def test_presets_give_the_documented_parts():
    fast = text_parts(gen_length=64, end_ids=(1, 2))
    assert (fast.blocks, fast.schedule, fast.selector, fast.exit) == (Fixed(32), None, Threshold(0.9), Eos((1, 2)))
    exact = text_parts(gen_length=64, end_ids=(1,), preset="exact", steps=16, block_length=8, cfg_scale=0.5)
    assert (exact.schedule, exact.selector, exact.exit) == (Linear(16), TopConfidence(), None)
    assert exact.guidance.scale == 1.5
    assert (fast.cache, text_parts(gen_length=8, end_ids=(1,), preset="turbo").cache, exact.cache) == (
        Dual(),
        Dual(),
        None,
    )
    reference = text_parts(gen_length=8, end_ids=(1,), compat="reference", temperature=1.0)
    assert (reference.sampler, reference.selector.published_ties) == (Gumbel(1.0), True)
    assert (reference.schedule, reference.cache, reference.exit) == (Linear(published=True), None, None)
    late = {
        t: text_parts(gen_length=8, end_ids=(1, 2), compat="reference", temperature=t, postpone=(1, 2))
        for t in (0.0, 1.0)
    }
    assert [late[t].constraint.postpone for t in (0.0, 1.0)] == [(1, 2), (2,)], "the published code forgets end of text"
    assert text_parts(gen_length=8, end_ids=(1,), remasking="random").selector == Random()
    assert text_parts(gen_length=8, end_ids=(1,), guidance=1.0).guidance is None
    drawn = image_parts(slots=64, num_inference_steps=12, guidance=1.0)
    assert (drawn.schedule, drawn.guidance, drawn.selector) == (Cosine(12), None, RandomTopK(1.0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"threshold": 0.9, "num_inference_steps": 8}, "num_inference_steps contradict"),
        ({"threshold": 0.9, "remasking": "random"}, "remasking contradict"),
        ({"steps": 8, "num_inference_steps": 8}, "another name"),
        ({"guidance": 2.0, "cfg_scale": 1.0}, "guidance - 1"),
        ({"top_p": 0.9}, "temperature 0"),
        ({"top_k": 0, "temperature": 1.0}, "top_k"),
        ({"temperature": -1.0}, "temperature"),
        ({"block_length": 9}, "block_length"),
        ({"block_length": 0}, "block_length"),
        ({"block_length": 3, "compat": "reference"}, "divide"),
        ({"block_length": 4, "steps": 3, "compat": "reference"}, "multiple"),
        ({"preset": "quick"}, "preset"),
        ({"compat": "v1"}, "compat"),
        ({"remasking": "high"}, "remasking"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_words_that_contradict_each_other_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        text_parts(gen_length=8, end_ids=(1,), **words)


def test_a_longer_context_raises_the_rotary_base_only():
    config = Config(width=4096, heads=32)
    longer = config.with_length(131072)
    assert longer.max_length == 131072
    assert longer.rope_theta == pytest.approx(561.94 * 5e5, rel=1e-4), "UltraLLaDA's factor for LLaDA-8B"
    assert dataclasses.replace(longer, max_length=4096, rope_theta=5e5) == config


SCHEDULES = [
    Linear(7),
    Cosine(7),
    Cosine(7, every_step=False),
    Shift(7),
    Shift(7, "cosine"),
    Expected(7),
    Energy(7, 0.5, 2.0),
]


def test_counts_of_every_schedule_sum_to_the_masks():
    for schedule in SCHEDULES:
        for masks in (1, 5, 7, 40):
            counts = schedule.counts(masks, 7)
            assert sum(counts) == masks
            assert min(counts) > 0
            assert len(counts) <= 7
    with pytest.raises(ConfigError, match="positive"):
        Energy(4, 0.0)
