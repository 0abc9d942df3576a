"""Ranks by hand, ties, and equal captions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from eval.retrieval import score
from mmdiff.errors import ConfigError
from mmdiff.rng import generator


def unit(n: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, dim, generator=generator(seed, "unit")), dim=1)


def test_equal_vectors_are_found_first() -> None:
    x = unit(20)
    got = score(x, x)
    assert dict(got.recall)[1] == 1
    assert got.median_rank == 1


def test_unrelated_vectors_are_found_by_chance() -> None:
    got = score(unit(400), unit(400, seed=1))
    assert dict(got.chance)[10] == pytest.approx(0.025)
    assert dict(got.recall)[10] == pytest.approx(0.025, abs=0.025)
    assert got.median_rank == pytest.approx(200, rel=0.2)


def test_ties_count_against_the_model() -> None:
    same = F.normalize(torch.ones(5, 4), dim=1)
    assert score(same, same).ranks == (5, 5, 5, 5, 5)


def test_equal_captions_are_one_candidate() -> None:
    texts = unit(3)[[0, 1, 1, 2]]
    got = score(texts, texts, keys=["a", "b", "b", "c"])
    assert (got.candidates, got.ranks) == (3, (1, 1, 1, 1))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="unit length"):
        score(2 * unit(4), unit(4))
    with pytest.raises(ConfigError, match="do not fit"):
        score(unit(4), unit(4, 8))
    with pytest.raises(ConfigError, match="must number"):
        score(unit(4), unit(3))
