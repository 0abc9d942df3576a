"""Tiling of pictures of any shape against the published code: fixture ``anyres``.

Every tensor and every entry of a row has a rule in `RULES` or `ENTRIES`; one without a rule fails.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mmdiff.images import Tiling, cut
from mmdiff.images.tiles import best_canvas
from mmdiff.images.views import Tiles

NAME = "anyres"
GREY_LEVEL, SAME_PILLOW, STATISTIC, ORDER = 1 / 127.5, 1e-6, 2e-3, 1e-3
EVERY = 16

RULES = {
    r"image\d+\.num_crops": 0.0,
    r"image\d+\.pixels_every16": None,
    r"image\d+\.(pad|square)\.pixels_every16": None,
    r"image\d+\.pixel_(mean|std)": STATISTIC,
    r"order\.\d+x\d+": ORDER,
}
"""Tensor -> tolerance; None: one grey level, or nearly nothing with the Pillow that made the data."""

ENTRIES = {
    "image_size_wh",
    "anyres_max",
    "grid_wh",
    "best_resolution_wh",
    "num_crops",
    "num_tokens",
    "num_newlines",
    "final_rows",
    "final_cols",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--fixtures")) / NAME
    config = json.loads((root / "config.json").read_text())
    for name, cases in (("row", "rows"), ("explicit", "explicit_rows")):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, config[cases], ids=lambda r: "x".join(map(str, r["image_size_wh"])))
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(root / "outputs.safetensors")))


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--fixtures")) / NAME


@pytest.fixture(scope="module")
def config(root: Path) -> dict[str, Any]:
    return json.loads((root / "config.json").read_text())


@pytest.fixture(scope="module")
def inputs(root: Path) -> dict[str, Tensor]:
    return load_file(root / "inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(root: Path) -> dict[str, Tensor]:
    return load_file(root / "outputs.safetensors")


def tiling(config: dict[str, Any], limit: int | None, crops: str = "anyres") -> Tiling:
    """The fixture's grid; a range of multiples in text is the default, a list is taken as it is."""
    given = config["grid_pinpoints"]
    if isinstance(given, str):
        a, b, c, d = map(int, re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", given).groups())
        given = [(config["tile"] * i, config["tile"] * j) for i in range(a, c + 1) for j in range(b, d + 1)]
    return Tiling(crops=crops, limit=limit, pinpoints=tuple(map(tuple, given)))


def view_of(size: tuple[int, int], plan: Tiling, tile: int) -> Tiles:
    width, height = best_canvas(size, plan.canvases(tile))
    return Tiles(width // tile, height // tile, size, plan.limit)


def test_every_row_has_the_published_grid_and_counts(row, config):
    assert set(row) <= ENTRIES, f"entries without a rule: {set(row) - ENTRIES}"
    size, tile, side = tuple(row["image_size_wh"]), config["tile"], config["patches_per_side"]
    plan = tiling(config, row["anyres_max"])
    view = view_of(size, plan, tile)
    assert list(best_canvas(size, plan.canvases(tile))) == row["best_resolution_wh"]
    tokens = view.arrange(torch.zeros(view.crops, side**2, 1), torch.ones(1))
    newlines = (tokens[:, 0] == 1).nonzero().flatten()
    found = {
        "image_size_wh": row["image_size_wh"],
        "anyres_max": row["anyres_max"],
        "best_resolution_wh": row["best_resolution_wh"],
        "grid_wh": [view.columns, view.rows],
        "num_crops": view.crops,
        "num_tokens": view.tokens(side),
        "num_newlines": len(newlines),
        "final_rows": len(newlines),
        "final_cols": int(newlines[0]) - side**2,
    }
    assert len(tokens) == view.tokens(side)
    assert {name: found[name] for name in row} == row


def test_every_row_of_an_explicit_list_has_the_published_canvas(explicit, config):
    plan = Tiling(pinpoints=tuple(map(tuple, config["explicit_pinpoints"])))
    found = best_canvas(tuple(explicit["image_size_wh"]), plan.canvases(config["tile"]))
    assert {"image_size_wh": explicit["image_size_wh"], "best_resolution_wh": list(found)} == explicit


def computed(name: str, config: dict[str, Any], inputs: dict[str, Tensor], tokens: int) -> Tensor:
    """What we compute for an output of the fixture whose first dimension is ``tokens``."""
    case, _, what = name.partition(".")
    tile, side = config["tile"], config["patches_per_side"]
    if case == "order":
        size = tuple(map(int, what.split("x")))
        limits = {row["anyres_max"] for row in config["rows"] if tuple(row["image_size_wh"]) == size}
        views = [view_of(size, tiling(config, limit), tile) for limit in limits]
        view = next(v for v in views if v.tokens(side) == tokens)
        patches = torch.arange(side**2)
        probe = torch.stack([patches * 0, patches // side, patches % side], dim=1).expand(view.crops, -1, -1).float()
        probe = probe + torch.arange(view.crops)[:, None, None] * torch.tensor([1.0, 0, 0])
        return view.arrange(probe, torch.full((3,), -1.0))
    picture = Image.fromarray(inputs[case].numpy())
    if "." in what:
        kind, what = what.split(".")
        return cut([picture], tile, tiling(config, None, kind))[0].pixels[0, :, ::EVERY, ::EVERY]
    crops = cut([picture], tile, tiling(config, None))[0]
    flat = crops.pixels.flatten(2)
    values = {
        "num_crops": torch.tensor([len(crops.pixels)]),
        "pixels_every16": crops.pixels[:, :, ::EVERY, ::EVERY],
        "pixel_mean": flat.mean(2),
        "pixel_std": flat.std(2),
    }
    assert crops.view.crops == len(crops.pixels)
    return values[what]


def test_output_follows_its_rule(output, config, inputs, outputs):
    rules = [tolerance for pattern, tolerance in RULES.items() if re.fullmatch(pattern, output)]
    assert rules, f"{output} has no rule"
    tolerance = rules[0]
    if tolerance is None:
        tolerance = SAME_PILLOW if config["pillow"] == PIL.__version__ else GREY_LEVEL
    ours = computed(output, config, inputs, len(outputs[output]))
    assert ours.shape == outputs[output].shape
    torch.testing.assert_close(ours, outputs[output], atol=tolerance, rtol=0)


def test_every_input_is_used(inputs, outputs):
    assert set(inputs) <= {name.partition(".")[0] for name in outputs}
