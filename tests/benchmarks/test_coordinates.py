"""The bounds that the figures of docs/scaling.md show are held for every family."""

from __future__ import annotations

import pytest

from benchmarks.coordinates import TREES, WIDTHS, base_of
from mmdiff.scale.coordinates import coord_check
from mmdiff.scale.trials import trials

BOUNDS = {"sp": 0.8, "plain": 0.4}
"""Smallest largest slope at the last step."""


def test_a_tied_readout_that_is_multiplied_keeps_to_the_bound():
    """The quick part of what follows: widths and seeds are fewer."""
    report = coord_check(trials(base_of("maskgit_halton"), "mup"), (64, 128, 256), steps=4, seeds=2)
    assert report.max_slope <= 0.2, report.verdict()


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_sizes_do_not_depend_on_the_width_under_mup(name):
    report = coord_check(trials(base_of(name), "mup"), WIDTHS, steps=4, seeds=3)
    assert report.max_slope <= 0.2, report.verdict()


@pytest.mark.slow
@pytest.mark.parametrize("variant", BOUNDS)
@pytest.mark.parametrize("name", TREES)
def test_sizes_grow_where_a_rule_is_left_out(name, variant):
    report = coord_check(trials(base_of(name), variant), (64, 128, 256), steps=4, seeds=1)
    assert report.steepest(4).slope >= BOUNDS[variant], report.verdict()
