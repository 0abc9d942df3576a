"""The bounds that the figures of docs/scaling.md show are held for every family."""

from __future__ import annotations

import pytest

from benchmarks.coordinates import TREES, WIDTHS
from mmdiff.config import parse
from mmdiff.models.registry import FAMILIES
from mmdiff.scale.coordinates import coord_check
from mmdiff.scale.trials import trials

BOUNDS = {"sp": 0.8, "plain": 0.4}
"""Smallest largest slope at the last step."""


def base_of(name: str):
    return parse(FAMILIES[name].config, {"type": name, **TREES[name]}, name)


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
