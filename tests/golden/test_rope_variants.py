"""Rotary and sine-cosine positions against published code: fixture ``rope_variants``.

Every tensor has a rule in `RULES`, every table one in `TABLES`; one without a rule fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdiff.nn import axial, posemb, rope
from mmdiff.nn.axial import Riflex

NAME = "rope_variants"
TABLE_RTOL = 1e-5

Options = dict[str, Any]


def line(c: Options, *, interleaved: bool = True, riflex: bool = False) -> tuple[Tensor, Tensor]:
    rule = {0: Riflex(c["k"], c["L_test"])} if riflex else None
    positions = axial.grid_positions((c["n1"],))
    return axial.axis_tables(positions, (c["dim1"],), c["theta"], interleaved=interleaved, riflex=rule)


def plane(c: Options) -> tuple[Tensor, Tensor]:
    top, left, bottom, right = map(float, c["crop"])
    positions = axial.grid_positions(c["grid2"], start=(top, left), stop=(bottom, right)).flip(1)
    return axial.axis_tables(positions, (c["dim2"] // 2,) * 2, 10_000.0)  # the published function takes no other base


def video(c: Options, *, spread: bool = False, riflex: bool = False) -> tuple[Tensor, Tensor]:
    d, (t, h, w) = c["dim3"], c["grid3"]
    box = {"start": (0.0, 0.0, 1.0), "stop": (float(t), h + 2.0, w + 4.0)} if spread else {}
    rule = {0: Riflex(c["k"], c["L_test"])} if riflex else None
    positions = axial.grid_positions((t, h, w), **box)
    return axial.axis_tables(positions, (d // 4, d * 3 // 8, d * 3 // 8), c["theta"], riflex=rule)


def sincos(c: Options) -> Tensor:
    s, n = c["sincos"], c["sincos"]["grid_size"]
    return posemb.sincos_2d(c["dim2"], n, n, scale=n / s["base_size"] * s["interpolation_scale"])


TABLES_OF: dict[str, Callable[[Options, dict[str, Tensor]], tuple[Tensor, Tensor]]] = {
    "1d.interleaved": lambda c, _: line(c),
    "1d.half": lambda c, _: line(c, interleaved=False),
    "1d.riflex": lambda c, _: line(c, riflex=True),
    "2d": lambda c, _: plane(c),
    "3d.slice": lambda c, _: video(c),
    "3d.linspace": lambda c, _: video(c, spread=True),
    "3d.riflex": lambda c, _: video(c, riflex=True),
    "axes": lambda c, out: axial.axis_tables(out["axes.ids"].double(), c["axes"], c["theta"]),
}

RULES = {
    "|".join(map(re.escape, TABLES_OF)).join((r"(", r")\.(cos|sin)")): "tolerance",
    r"1d\.(interleaved|half)\.out": "tolerance",
    r"sincos2d": "tolerance",
    r"1d\.x|axes\.ids": "input",
}


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--fixtures")) / NAME


@pytest.fixture(scope="module")
def options(root: Path) -> Options:
    return json.loads((root / "config.json").read_text())


@pytest.fixture(scope="module")
def outputs(root: Path) -> dict[str, Tensor]:
    return load_file(root / "outputs.safetensors")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--fixtures")) / NAME
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(root / "outputs.safetensors")))
    if "table" in metafunc.fixturenames:
        tables = json.loads((root / "tables.json").read_text())
        metafunc.parametrize("table", [(name, i) for name, rows in tables.items() for i in range(len(rows))])


def ours(name: str, options: Options, outputs: dict[str, Tensor]) -> Tensor:
    family, _, part = name.rpartition(".")
    if name == "sincos2d":
        return sincos(options)
    if part != "out":
        return TABLES_OF[family](options, outputs)[part == "sin"]
    cos, sin = TABLES_OF[family](options, outputs)
    x = outputs["1d.x"]
    if family == "1d.interleaved":
        return axial.rotate_pairs(x, cos, sin)
    return rope.rotate(x.transpose(1, 2), cos[None, :, None], sin[None, :, None]).transpose(1, 2)


def farthest(name: str, options: Options, outputs: dict[str, Tensor]) -> float:
    """The largest position of a table."""
    sizes = {"1": options["n1"], "2": max(options["crop"]), "3": max(options["grid3"]) + 4}
    return outputs["axes.ids"].max().item() if name.startswith("axes") else sizes.get(name[0], 0)


def test_output_follows_its_rule(output, options, outputs):
    rule = next((rule for pattern, rule in RULES.items() if re.fullmatch(pattern, output)), None)
    assert rule is not None, f"{output} has no rule"
    if rule == "tolerance":
        atol = 1e-5 if farthest(output, options, outputs) > 100 else 2e-6
        torch.testing.assert_close(ours(output, options, outputs), outputs[output].float(), atol=atol, rtol=0)


def test_our_half_split_tables_are_those_of_the_language_model(options):
    cos, sin = rope.tables(torch.arange(options["n1"])[None], options["dim1"], options["theta"])
    expected = line(options, interleaved=False)
    atol = 1e-5 if options["n1"] > 100 else 2e-6
    torch.testing.assert_close((cos[0, :, 0], sin[0, :, 0]), expected, atol=atol, rtol=0)


def test_table_follows_its_rule(table, root):
    name, i = table
    row = json.loads((root / "tables.json").read_text())[name][i]
    if name == "identify_k":
        assert axial.intrinsic_frequency(row["dim"], float(row["base"]), row["first_repetition"]) == (
            row["k"],
            row["period"],
        )
        assert set(row) == {"base", "dim", "first_repetition", "k", "period"}
        return
    assert name == "ntk", f"table {name} has no rule"
    assert set(row) == {"base", "head_dim", "train_length", "target_length", "baseline", "diffusion_aware"}
    for variant, bidirectional in (("baseline", False), ("diffusion_aware", True)):
        lengths = row["train_length"], row["target_length"]
        found = axial.stretch(float(row["base"]), row["head_dim"], *lengths, bidirectional=bidirectional)
        expected = row[variant]
        assert set(expected) == {"d_crit", "scale", "new_base"}
        assert found.critical == expected["d_crit"]
        assert found.scale == pytest.approx(expected["scale"], rel=TABLE_RTOL)
        assert found.theta == pytest.approx(expected["new_base"], rel=TABLE_RTOL)


def test_tables_cover_the_cases_of_the_configuration(options, root):
    tables = json.loads((root / "tables.json").read_text())
    assert [[r["base"], r["dim"], r["first_repetition"]] for r in tables["identify_k"]] == options["ident"]
    lengths = ("base", "head_dim", "train_length", "target_length")
    assert [[r[k] for k in lengths] for r in tables["ntk"]] == options["ntk"]
