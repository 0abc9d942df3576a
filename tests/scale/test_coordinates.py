"""Coordinate checks on networks whose slopes are known, and of every family of the house."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdiff.errors import ConfigError
from mmdiff.scale.coordinates import Trial, coord_check


class Powers(nn.Module):
    """Outputs whose size is a power of the width, with a factor per seed."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.flat, self.root, self.gone = nn.Identity(), nn.Identity(), nn.Identity()
        self.width, self.noise = width, 1 + 0.1 * seed

    def forward(self, t: int) -> torch.Tensor:
        one = torch.ones(2)
        self.gone(0 * one)
        self.flat(self.noise * one)
        return self.root(one * self.width ** (0.5 * t))


def powers(width: int, seed: int) -> Trial:
    model, count = Powers(width, seed), iter(range(100))
    return Trial(model, lambda: model(next(count)))


def test_slopes_of_powers_are_their_exponents():
    report = coord_check(powers, (8, 16, 32), steps=3, seeds=2)
    slopes = {(c.module, c.t): c.slope for c in report.curves}
    for t in (1, 2, 3):
        assert slopes["root", t] == pytest.approx(0.5 * (t - 1), abs=1e-6)
        assert slopes["flat", t] == pytest.approx(0, abs=1e-6)
        assert slopes["gone", t] is None
    assert (report.worst.module, report.worst.t) == ("root", 3)
    assert report.max_slope == pytest.approx(1)
    assert report.steepest(1).slope == pytest.approx(0, abs=1e-6)
    assert report.verdict().startswith("sizes depend on the width: largest |slope| 1.000 +- 0.000 (root, t = 3)")
    assert coord_check(powers, (8, 16, 32), steps=1, seeds=2).verdict().startswith("sizes do not depend on the width")


def test_intervals_widen_with_the_spread_of_the_seeds():
    def noisy(width: int, seed: int) -> Trial:
        model = Powers(width, 3 * seed if width == 16 else 0)
        return Trial(model, lambda: model(0))

    report = coord_check(noisy, (8, 16, 32), steps=1, seeds=3)
    flat = next(c for c in report.curves if c.module == "flat")
    assert flat.error > 0.05
    assert "not surely" in report.verdict(limit=0.01)
    assert [len(row) for row in flat.sizes] == [3, 3, 3]


def test_a_run_that_blows_up_has_an_infinite_slope():
    def make(width: int, seed: int) -> Trial:
        model = nn.Identity()
        return Trial(model, lambda: model(torch.tensor([float("nan") if width > 8 else 1.0])))

    assert coord_check(make, (8, 16), steps=1, seeds=1).max_slope == float("inf")


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="at least two different ones"):
        coord_check(powers, (8, 8))

    def other(width: int, seed: int) -> Trial:
        model = nn.Sequential(*(nn.Identity() for _ in range(width)))
        return Trial(model, lambda: model(torch.ones(1)))

    with pytest.raises(ConfigError, match="other modules at another width"):
        coord_check(other, (1, 2), steps=1, seeds=1)
