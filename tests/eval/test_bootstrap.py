"""Bounds cover what they claim; pairs and clusters are respected."""

from __future__ import annotations

import pytest
import torch

from eval.bootstrap import bootstrap, macro_mean, paired, rate
from mmdiff.errors import ConfigError
from mmdiff.rng import generator


def test_lower_bound_covers_the_truth_as_often_as_it_claims() -> None:
    gen = generator(0, "coverage")
    below = sum(bootstrap(torch.rand(60, generator=gen) < 0.7, draws=300, seed=i).lower <= 0.7 for i in range(300))
    assert 0.90 <= below / 300 <= 0.99


def test_bounds_equal_an_ordinary_bootstrap() -> None:
    values = torch.randn(80, generator=generator(0, "values")).double()
    got = bootstrap(values, draws=4000)
    picks = torch.randint(80, (4000, 80), generator=generator(9, "plain"))
    means = values[picks].mean(dim=1)
    spread = float(means.std())
    assert got.value == pytest.approx(float(values.mean()))
    assert got.lower == pytest.approx(float(means.quantile(0.05)), abs=0.1 * spread)
    assert got.upper == pytest.approx(float(means.quantile(0.95)), abs=0.1 * spread)


def test_clusters_widen_the_bounds_when_items_repeat_each_other() -> None:
    concepts = torch.randn(20, generator=generator(0, "concepts"))
    values, groups = concepts.repeat_interleave(10), [i // 10 for i in range(200)]
    alone, together = bootstrap(values), bootstrap(values, groups=groups)
    assert (together.n, together.groups, alone.groups) == (200, 20, 200)
    ratio = (together.upper - together.lower) / (alone.upper - alone.lower)
    assert ratio == pytest.approx(10**0.5, rel=0.2)


def test_singleton_clusters_equal_no_clusters() -> None:
    values = torch.randn(40, generator=generator(0, "values"))
    one, two = bootstrap(values), bootstrap(values, groups=[f"g{i}" for i in range(40)])
    assert one == two


def test_paired_difference_is_surer_than_two_single_ones() -> None:
    gen = generator(0, "pairs")
    hard = torch.randn(200, generator=gen)
    a, b = hard + 0.1, hard + 0.01 * torch.randn(200, generator=gen)
    got = paired(a, b)
    assert got.value == pytest.approx(0.1, abs=0.005)
    assert got.lower > 0.09
    assert bootstrap(a).lower < 0.05


def test_macro_mean_counts_every_class_the_same() -> None:
    values, labels = [1, 1, 1, 1, 0, 0], ["a", "a", "a", "a", "b", "b"]
    got = bootstrap(values, macro_mean(labels), draws=200)
    assert got.value == pytest.approx(0.5)
    assert 0 <= got.lower <= 0.5 <= got.upper <= 1


def test_same_seed_same_bounds_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(50, generator=generator(0, "values"))
    whole = bootstrap(values, seed=4)
    assert bootstrap(values, seed=4) == whole
    assert bootstrap(values, seed=5) != whole
    monkeypatch.setitem(bootstrap.__globals__, "_CHUNK", 50 * 64)
    assert bootstrap(values, seed=4) == whole


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    bootstrap([0.0, 1.0, 1.0])
    assert torch.equal(before, torch.get_rng_state())


def test_rate_is_not_degenerate_at_the_ends() -> None:
    assert rate(50, 50).value == 1
    assert rate(50, 50).lower == pytest.approx(50 / (50 + 1.6448536**2), rel=1e-6)
    assert rate(0, 50).upper == pytest.approx(1 - rate(50, 50).lower, rel=1e-9)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="no items"):
        bootstrap([])
    with pytest.raises(ConfigError, match="group keys"):
        bootstrap([1.0, 2.0], groups=["a"])
    with pytest.raises(ConfigError, match="level"):
        bootstrap([1.0, 2.0], level=1.0)
    with pytest.raises(ConfigError, match="same items"):
        paired([1.0], [1.0, 2.0])
