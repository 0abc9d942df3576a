"""Draws depend on (seed, stream, index) and on nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdiff import rng

DRAWS = [rng.uniform, rng.normal, rng.gumbel]


def test_derived_seeds_are_stable_across_processes_and_releases() -> None:
    assert rng.derive(0, "mask", 1) == 7167570646504993116
    code = "from mmdiff import rng; print(rng.derive(0, 'mask', 1))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == rng.derive(0, "mask", 1)


streams = st.lists(st.text(max_size=3) | st.integers(0, 99), max_size=3).map(tuple)


@given(a=st.integers(0, 9), b=st.integers(0, 9), x=streams, y=streams)
def test_different_seeds_or_streams_give_different_numbers(a: int, b: int, x: tuple, y: tuple) -> None:
    assert (rng.derive(a, *x) == rng.derive(b, *y)) == ((a, x) == (b, y))
    assert 0 <= rng.derive(a, *x) < 2**63


def test_text_and_number_of_a_stream_are_told_apart() -> None:
    assert rng.derive(0, "1") != rng.derive(0, 1)


@pytest.mark.parametrize("draw", DRAWS)
def test_same_generator_state_gives_same_draws(draw) -> None:
    a = draw(rng.generator(3, "x"), (4, 5))
    b = draw(rng.generator(3, "x"), (4, 5))
    assert torch.equal(a, b)
    assert a.dtype == torch.float32
    assert not torch.equal(a, draw(rng.generator(3, "y"), (4, 5)))


@pytest.mark.parametrize("draw", DRAWS)
def test_row_does_not_depend_on_the_rows_beside_it(draw) -> None:
    one = draw([rng.generator(0, "row", 1)], (1, 7))
    three = draw([rng.generator(0, "row", i) for i in range(3)], (3, 7))
    assert torch.equal(three[1], one[0])


@pytest.mark.parametrize("draw", DRAWS)
def test_number_of_generators_must_be_the_number_of_rows(draw) -> None:
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        draw([rng.generator(0), rng.generator(1)], (3, 2))


@pytest.mark.parametrize("draw", DRAWS)
def test_global_state_is_neither_read_nor_changed(draw) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = draw(rng.generator(1), (3,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(draw(rng.generator(1), (3,)), a)


def test_draws_have_the_moments_of_their_distribution() -> None:
    n = 200_000
    uniform, normal, gumbel = (draw(rng.generator(5), (n,)).double() for draw in DRAWS)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    for x, mean, variance in [(uniform, 0.5, 1 / 12), (normal, 0.0, 1.0), (gumbel, 0.5772157, torch.pi**2 / 6)]:
        assert abs(x.mean() - mean) < 5 * (variance / n) ** 0.5
        assert abs(x.var() / variance - 1) < 0.03
    assert gumbel.isfinite().all()


def test_gumbel_argmax_samples_the_categorical_distribution() -> None:
    p = torch.tensor([0.1, 0.2, 0.7])
    picks = (p.log() + rng.gumbel(rng.generator(2), (100_000, 3))).argmax(-1)
    assert torch.allclose(torch.bincount(picks) / 100_000, p, atol=0.006)


@given(rows=st.integers(1, 4), n=st.integers(1, 20))
def test_permutation_holds_every_number_once_per_row(rows: int, n: int) -> None:
    out = rng.permutation(rng.generator(0, rows, n), rows, n)
    assert out.dtype == torch.int64
    assert torch.equal(out.sort(-1).values, torch.arange(n).expand(rows, n))


def test_saved_state_is_json_and_continues_the_stream() -> None:
    gen = rng.generator(0, "x")
    rng.uniform(gen, (10,))
    saved = json.loads(json.dumps(rng.state(gen)))
    expected = rng.uniform(gen, (10,))
    assert torch.equal(rng.uniform(rng.restore(torch.Generator(), saved), (10,)), expected)


def test_tape_plays_recorded_draws_in_order() -> None:
    draws = [torch.rand(2, 3), torch.randn(4)]
    tape = rng.Tape(draws)
    assert torch.equal(rng.uniform(tape, (2, 3)), draws[0])
    assert torch.equal(rng.normal(tape, (4,)), draws[1])
    with pytest.raises(ValueError, match="holds 2 draws and one more"):
        rng.uniform(tape, (1,))


def test_tape_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"draw 0 of the tape has shape \(2, 3\), asked for \(3, 2\)"):
        rng.uniform(rng.Tape([torch.rand(2, 3)]), (3, 2))


def test_one_tape_per_row_is_played_row_by_row() -> None:
    rows = [torch.rand(3), torch.rand(3)]
    assert torch.equal(rng.gumbel([rng.Tape([r]) for r in rows], (2, 3)), torch.stack(rows))


def test_draws_go_to_the_device_that_is_asked_for() -> None:
    assert rng.uniform(rng.generator(0), (2,), device="meta").device.type == "meta"


@pytest.mark.parametrize("stream", [(), ("draw",), ("a", 3)])
def test_a_series_is_derive_with_its_last_number_open(stream: tuple) -> None:
    seeds = rng.series(5, *stream)
    assert [seeds(n) for n in (0, 7, 10**12)] == [rng.derive(5, *stream, n) for n in (0, 7, 10**12)]
