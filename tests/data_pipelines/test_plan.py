"""The order as a function: permutations, epochs, groups, mixtures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.plan import Plan, SourceTable, permute, permute_all
from data_pipelines.source import open_shards
from mmdiff.errors import ConfigError, ShardError

SEEDS = st.integers(0, 2**40)
SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=7).filter(any)


def table(sizes: list[int], weights: tuple[int, ...] = (1,), groups: list[int] | None = None) -> SourceTable:
    ends = np.cumsum(sizes)
    if groups is None:
        return SourceTable(shard_ends=ends, weights=weights)
    order = np.argsort(groups, kind="stable")
    return SourceTable(shard_ends=ends, weights=weights, group_ends=np.cumsum(np.bincount(groups)), members=order)


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
@settings(max_examples=30, deadline=None)
def test_permute_is_a_permutation(n: int, key: int) -> None:
    assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


@given(st.integers(1, 2**45), st.integers(0, 2**63 - 1), st.integers(0, 40), st.integers(0, 2**45))
@settings(max_examples=60, deadline=None)
def test_permuting_side_by_side_gives_what_permuting_one_by_one_does(n: int, key: int, count: int, start: int) -> None:
    numbers = [(start + 7 * i) % n for i in range(count)]
    assert permute_all(numbers, n, key) == [permute(i, n, key) for i in numbers]


def test_permutations_of_different_keys_look_unrelated() -> None:
    n = 1000
    one, two = ([permute(i, n, key) for i in range(n)] for key in (1, 2))
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 12
    assert abs(np.corrcoef(one, range(n))[0, 1]) < 0.1
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.1
    # Every place is about equally likely for a given element over many keys.
    places = Counter(permute(7, 8, key) for key in range(4000))
    assert all(abs(c - 500) < 5 * 500**0.5 for c in places.values())


@given(SIZES, SEEDS)
@settings(max_examples=40, deadline=None)
def test_an_epoch_holds_every_sample_of_uneven_shards_once(sizes: list[int], seed: int) -> None:
    plan, n = Plan(seed, [table(sizes)]), sum(sizes)
    everything = {(s, i) for s, size in enumerate(sizes) for i in range(size)}
    epochs = [[plan.at(e * n + i)[2:4] for i in range(n)] for e in range(2)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == n
        assert set(epoch) == everything


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), SEEDS)
@settings(max_examples=40, deadline=None)
def test_an_epoch_holds_every_group_once(groups: list[int], seed: int) -> None:
    groups = np.unique(groups, return_inverse=True)[1].tolist()
    plan, n = Plan(seed, [table([len(groups)], groups=groups)]), max(groups) + 1
    for epoch in range(3):
        drawn = [groups[plan.at(epoch * n + i).sample] for i in range(n)]
        assert sorted(drawn) == list(range(n))


def test_variants_of_a_group_are_all_drawn_about_equally_often() -> None:
    plan = Plan(3, [table([40], groups=[0] * 38 + [1, 1])])
    drawn = Counter(plan.at(i).sample for i in range(8000))
    assert sum(drawn[i] for i in (38, 39)) == 4000
    assert all(abs(drawn[i] - 4000 / 38) < 5 * (4000 / 38) ** 0.5 for i in range(38))


@given(st.lists(st.tuples(SIZES, st.lists(st.integers(1, 9), min_size=1, max_size=3)), min_size=1, max_size=4), SEEDS)
@settings(max_examples=30, deadline=None)
def test_sources_and_tasks_take_turns_by_weight_and_each_source_keeps_its_epochs(
    sources: list[tuple[list[int], list[int]]], seed: int
) -> None:
    plan = Plan(seed, [table(sizes, tuple(weights)) for sizes, weights in sources])
    total = sum(sum(w) for _, w in sources)
    draws = [plan.at(i) for i in range(2 * total)]
    counts = Counter((d.source, d.task) for d in draws)
    assert counts == {(s, t): 2 * w for s, (_, weights) in enumerate(sources) for t, w in enumerate(weights)}
    for s, (sizes, _) in enumerate(sources):
        mine = [d[2:4] for d in draws if d.source == s]
        n = sum(sizes)
        for start in range(0, len(mine) - n + 1, n):
            assert len(set(mine[start : start + n])) == n


def test_turns_are_spread_evenly() -> None:
    plan = Plan(0, [table([10], (3,)), table([10], (1,))])
    assert [plan.at(i).source for i in range(8)] == [0, 0, 1, 0, 0, 0, 1, 0]


@given(st.integers(0, 10**12), SEEDS)
@settings(max_examples=50, deadline=None)
def test_at_is_pure_and_needs_no_history(position: int, seed: int) -> None:
    one, two = (Plan(seed, [table([7, 0, 90]), table([5], (2,))]) for _ in range(2))
    for other in range(3):
        two.at(position + other)
    assert one.at(position) == two.at(position)
    assert one.at(position).seed != one.at(position + 1).seed


@given(st.lists(SIZES, min_size=1, max_size=3), SEEDS, st.integers(0, 10**12), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_many_positions_are_those_one_by_one(sizes: list[list[int]], seed: int, start: int, step: int) -> None:
    grouped = table([40], (2, 1), groups=[0] * 38 + [1, 1])
    plan = Plan(seed, [*(table(mine, (1, 3)) for mine in sizes), grouped])
    positions = range(start, start + 60 * step, step)
    assert plan.many(positions) == [plan.at(position) for position in positions]


def test_replacements_stay_with_source_and_task_and_differ() -> None:
    plan = Plan(0, [table([500], (1, 2)), table([500])])
    for position in range(20):
        first = plan.at(position)
        others = [plan.replacement(position, a) for a in range(1, 6)]
        assert {(d.source, d.task) for d in others} == {(first.source, first.task)}
        assert len({d.sample for d in others}) >= 4
        assert len({d.seed for d in [first, *others]}) == 6


def test_the_hash_tells_every_change_of_the_order(make_shards: Callable[..., list[Path]]) -> None:
    shards = open_shards([str(p) for p in make_shards(30, 10)])
    same = open_shards([str(p) for p in make_shards(30, 10, folder="moved")])
    changed = open_shards([str(p) for p in make_shards(30, 10, folder="changed", caption="other")])

    def digest(seed: int = 0, shards: list = shards, weights: tuple = (1, 2), balance: str = "none") -> str:
        return Plan(seed, [SourceTable.from_shards(shards, weights, balance)]).hash

    hashes = [digest(), digest(1), digest(weights=(2, 2)), digest(balance="concept"), digest(shards=changed)]
    hashes += [digest(shards=shards[::-1][:2]), digest(shards=shards[:2])]
    assert len(set(hashes)) == len(hashes)
    assert digest(shards=same) == digest()


def test_balancing_makes_groups_of_concepts_across_shards(make_shards: Callable[..., list[Path]]) -> None:
    shards = open_shards([str(p) for p in make_shards(23, 10)])
    balanced = SourceTable.from_shards(shards, (1,), "concept")
    assert (balanced.samples, balanced.groups) == (23, 5)
    drawn = {shards[s][i].concept for s, i in (balanced.locate(balanced.member(g, 5)) for g in range(5))}
    assert drawn == {f"c{i}" for i in range(5)}


def test_impossible_plans_are_refused(make_shards: Callable[..., list[Path]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one source"):
        Plan(0, [])
    with pytest.raises(ConfigError, match="at least 1"):
        Plan(0, [table([5], (0,))])
    with pytest.raises(ConfigError, match="use smaller integers"):
        Plan(0, [table([5], (665_557, 2))])
    with pytest.raises(ShardError, match="no samples"):
        SourceTable.from_shards([])
    plain = open_shards([str(p) for p in make_shards(3, concept=None)])
    with pytest.raises(ShardError, match="concept"):
        SourceTable.from_shards(plain, (1,), "concept")
