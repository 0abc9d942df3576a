"""Crops and views: what the golden data leaves out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmdiff.errors import ConfigError
from mmdiff.images import Crops, Flat, Frames, Tiles, Tiling, View, cut, film

SIDE, WIDTH = 3, 5


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.sampled_from([None, 1, 4, 9]),
)
def test_the_number_of_tokens_is_known_before_the_features(grid, size, limit) -> None:
    view = Tiles(*grid, size, limit)
    features = torch.rand(view.crops, SIDE**2, WIDTH, generator=torch.Generator().manual_seed(0))
    tokens = view.arrange(features, torch.full((WIDTH,), -1.0))
    assert tokens.shape == (view.tokens(SIDE), WIDTH)
    assert torch.equal(tokens[: SIDE**2], features[0])
    assert isinstance(view, View)


@pytest.mark.parametrize(
    ("view", "count"),
    [
        (Flat(), 9),
        (Flat(3), 27),
        (Flat(2, newline=True), 19),
        (Frames(3), 3 * 2 * 3),
        (Frames(3, "frame"), 3 * 5),
        (Frames(3, "one_token"), 13),
        (Frames(3, "no_token"), 12),
    ],
)
def test_other_views_have_their_numbers_of_tokens(view, count) -> None:
    newline = torch.full((WIDTH,), -1.0)
    tokens = view.arrange(torch.ones(view.crops, SIDE**2, WIDTH), newline)
    assert len(tokens) == view.tokens(SIDE) == count
    inner = {"grid": 6, "frame": 3, "one_token": 1, "no_token": 0}
    newlines = inner[view.newline] if isinstance(view, Frames) else int(view.newline)
    assert int((tokens == newline).all(1).sum()) == newlines


def test_a_picture_is_one_square_several_squares_or_tiles() -> None:
    wide, tall = Image.new("RGB", (40, 10), "red"), Image.new("RGB", (5, 20), "red")
    assert [c.view for c in cut([wide, tall], 10)] == [Flat(), Flat()]
    (tiled,) = cut([wide], 10, Tiling())
    assert tiled.view == Tiles(4, 1, (40, 10), 4)
    assert tiled.pixels.shape == (5, 3, 10, 10)
    assert (tiled.pixels[:, 0] == 1).all()
    assert [c.view for c in cut([wide, tall], 10, Tiling())] == [Flat(newline=True)] * 2
    assert cut([wide], 10, Tiling(newlines=False))[0].view == Flat(5)
    squeezed, padded = cut([tall], 10, Tiling(crops="square"))[0], cut([tall], 10, Tiling(crops="pad"))[0]
    assert (squeezed.pixels[:, 0] == 1).all()
    assert padded.pixels[0, 0, 5, 0] == pytest.approx(127 / 127.5 - 1)
    assert cut([], 10, Tiling()) == []
    frames = film([wide, tall], 10, Tiling(video_newlines="frame"))
    assert frames.view == Frames(2, "frame")
    assert isinstance(frames.to(torch.zeros(1, dtype=torch.float64)), Crops)
    assert frames.to(torch.zeros(1, dtype=torch.float64)).pixels.dtype == torch.float64


def test_pinpoints_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match="no multiple of the 10 pixels"):
        Tiling(pinpoints=((10, 15),)).canvases(10)
    for bad in ((), ((0, 10),), ((100_000, 100_000),)):
        with pytest.raises(ConfigError, match="pinpoint"):
            Tiling(pinpoints=bad)
    assert len(Tiling().canvases(10)) == 36
