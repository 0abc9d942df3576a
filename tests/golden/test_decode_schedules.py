"""How many tokens per step, against the published functions: fixture ``decode_schedules``."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdiff.nn.rope import stretched
from mmdiff.sampling import Cosine, Energy, Expected, Linear, RandomTopK, Shift
from tests.helpers.golden import root_of, rule, tree_of

NAME = "decode_schedules"
RULES = {
    r"(llada|lavida|dllm|maskgit|mmada\.keep)\..*": "exact",
    r"mmada\.temperature\..*": "relative 1e-6",
    r"energy\.(alpha|grid).*": "relative 1e-9",
    r"rope\.ntk": "relative 1e-9",
}
KINDS = {"llada", "lavida", "dllm", "maskgit", "mmada", "energy", "rope"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "output" in metafunc.fixturenames:
        found = load_file(root_of(metafunc.config, NAME) / "outputs.safetensors")
        metafunc.parametrize("output", sorted(found))


@pytest.fixture(scope="module")
def outputs(request) -> dict[str, Tensor]:
    return load_file(root_of(request.config, NAME) / "outputs.safetensors")


@pytest.fixture(scope="module")
def tree(request) -> dict[str, Any]:
    return tree_of(request.config, NAME)


def named(tree: dict[str, Any]) -> dict[str, tuple[str, list[Any]]]:
    """Tensor name -> (kind, numbers) of everything that config.json lists."""
    out: dict[str, tuple[str, list[Any]]] = {"rope.ntk": ("rope.ntk", tree["rope"])}
    for kind in ("llada", "lavida", "dllm", "maskgit"):
        out |= {".".join(map(str, [kind, *entry])): (kind, entry) for entry in tree[kind]}
    for n, s, start in tree["mmada"]:
        out |= {f"mmada.{what}.{n}.{s}": (f"mmada.{what}", [n, s, start]) for what in ("keep", "temperature")}
    for a, b in tree["energy"]:
        out[f"energy.alpha.{a}.{b}"] = ("energy.alpha", [a, b])
    return out | ({"energy.grid": ("energy.grid", [])} if tree["energy"] else {})


def spent(keep: Tensor, masks: int) -> list[int]:
    """Counts from the numbers of masks kept after each step, the last step taking all; idle steps left out."""
    left = [masks, *keep[:-1].tolist(), 0]
    return [a - b for a, b in pairwise(left) if a != b]


def curve(name: str) -> Any:
    if name == "cosine":
        return "cosine"
    return 1.0 if name == "plain" else float(name.removeprefix("shift"))


def check(kind: str, numbers: list[Any], expected: Tensor, outputs: dict[str, Tensor]) -> None:
    if kind == "llada" or (kind == "lavida" and numbers[0] == "none"):
        masks, steps = numbers[-2:]
        assert Linear(steps, published=True).counts(masks, steps) == expected.tolist()
        assert Linear(steps).counts(masks, steps) == [n for n in expected.tolist() if n]
    elif kind == "lavida":
        name, masks, steps = numbers
        assert Shift(steps, curve(name)).counts(masks, steps) == expected.tolist()
    elif kind == "dllm":
        name, masks, steps = numbers
        assert name == "cosine"
        assert Expected(steps).counts(masks, steps) == expected.tolist()
    elif kind in ("maskgit", "mmada.keep"):
        masks, steps = numbers[:2]
        ours = Cosine(steps, every_step=kind == "mmada.keep").counts(masks, steps)
        assert ours == spent(expected, masks)
    elif kind == "mmada.temperature":
        _, steps, start = numbers
        ours = [start * RandomTopK(start, "compound").share(j, steps) for j in range(steps)]
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), expected, rtol=1e-6, atol=0)
    elif kind == "energy.alpha":
        schedule = Energy(8, *numbers)
        ours = torch.tensor([schedule.alpha(x) for x in outputs["energy.grid"].tolist()], dtype=torch.float64)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
    elif kind == "rope.ntk":
        ours = torch.tensor([stretched(*row) for row in numbers], dtype=torch.float64)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
    else:
        assert kind == "energy.grid"
        assert ((expected >= 0) & (expected <= 1)).all()


def test_output_is_the_published_one(output, outputs, tree):
    assert rule(RULES, output)
    kind, numbers = named(tree)[output]
    check(kind, numbers, outputs[output], outputs)


def test_everything_listed_is_there(outputs, tree):
    assert set(tree) == KINDS
    assert set(named(tree)) == set(outputs)
