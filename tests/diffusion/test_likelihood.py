"""Monte-Carlo likelihood: numbers of masked tokens, unbiasedness, draws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mmdiff import rng
from mmdiff.diffusion.likelihood import confidence_score, log_likelihood, masked_counts, stratified_masks

VOCAB, LENGTH = 5, 4


def network(masked):
    """Logits that depend on how many and which slots are masked."""
    table = torch.randn(2**LENGTH, LENGTH, VOCAB, generator=torch.Generator().manual_seed(0))
    return table[(masked.long() * 2 ** torch.arange(LENGTH)).sum(1)]


def test_numbers_of_masked_tokens_are_spread_evenly():
    assert masked_counts(5, 8, 4).tolist() == [5, 7, 1, 3]
    assert masked_counts(1, 3, 3).tolist() == [1, 2, 3]
    # linspace(2, 5.5, 8) for eight rows of a four-token answer; 2.5 and 4.5 round to even.
    assert masked_counts(2, 4, 8).tolist() == [2, 2, 3, 4, 4, 4, 1, 2]
    for first in range(1, 8):
        counts = masked_counts(first, 7, 70)
        assert (torch.bincount(counts, minlength=8)[1:] - 10).abs().max() <= 1


@pytest.mark.parametrize(("samples", "batch"), [(1, 16), (16, 16), (37, 8)])
def test_masks_hide_as_many_tokens_as_the_counts_say_and_repeat_with_the_seed(samples, batch):
    masks = stratified_masks(LENGTH, samples, batch, rng.generator(3))
    assert [len(m) for m in masks] == [batch] * (samples // batch) + [samples % batch] * bool(samples % batch)
    counts = torch.cat(masks).sum(1)
    assert counts.min() >= 1
    assert counts.max() <= LENGTH
    again = stratified_masks(LENGTH, samples, batch, rng.generator(3))
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))


def test_the_estimate_converges_to_the_expectation_over_all_masks():
    answer = torch.tensor([0, 3, 1, 4])
    exact = 0.0
    for size in range(1, LENGTH + 1):
        subsets = list(itertools.combinations(range(LENGTH), size))
        for chosen in subsets:
            masked = torch.tensor([[i in chosen for i in range(LENGTH)]])
            log_p = network(masked)[0].log_softmax(-1)
            weight = LENGTH / size / len(subsets) / LENGTH
            exact += weight * sum(float(log_p[i, answer[i]]) for i in chosen)
    masks = stratified_masks(LENGTH, 20_000, 500, rng.generator(1))
    assert math.isclose(log_likelihood(network, answer, masks), exact, rel_tol=0.01)


def test_an_answer_of_one_token_needs_one_sample():
    table = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    value = log_likelihood(lambda m: table.expand(len(m), 1, -1), torch.tensor([2]), [torch.ones(1, 1).bool()])
    assert math.isclose(value, float(table.log_softmax(-1)[2]), rel_tol=1e-6)


def test_the_easiest_token_is_revealed_first_and_every_one_once():
    answer = torch.tensor([0, 3, 1, 4])
    found = confidence_score(network, answer)
    assert sorted(found.order.tolist()) == [0, 1, 2, 3]
    masked = torch.ones(1, LENGTH, dtype=torch.bool)
    for place, loss in zip(found.order, found.losses, strict=True):
        log_p = network(masked)[0].log_softmax(-1)[torch.arange(LENGTH), answer]
        assert float(log_p[masked[0]].max()) == pytest.approx(-float(loss))
        assert masked[0, place]
        masked[0, place] = False
