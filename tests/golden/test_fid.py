"""Distances from given features against the published tools: fixture ``fid``.

Every number of ``expected.json`` has a rule in `RULES`: a path pattern, what we compute, and how close it must be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eval import fid
from eval.cmmd import cmmd
from eval.inception_score import inception_score, splits_in_order, splits_shuffled
from eval.kid import kid, kid_subsets
from eval.neighbours import coverage, precision_recall
from eval.statistics import Moments, Statistics

NAME = "fid"
KID_SUBSETS, KID_SEED = r"subsets(\d+)", r"seed(\d+)"
INFORMATIVE = None

Sets = dict[str, Tensor]
Check = Callable[[Sets, tuple[str, ...], Any, dict], None]


def pair(sets: Sets, name: str) -> tuple[Tensor, Tensor]:
    return sets[f"{name}.a"], sets[f"{name}.b"]


def distance(sets: Sets, path: tuple[str, ...], expected: float, tree: dict) -> None:
    _, name, tool = path
    found = fid.score(*pair(sets, name), measures=("fid",)).fid
    float32_mean = tree["statistics_dtypes"][name][0] == "float32" and not tool.startswith(
        ("pytorch_fid", "torchmetrics", "symmetric")
    )
    # The reference's float32 mean is off where features have a large common offset; the size of that gap is its own.
    a, b = (x.double().mean(dim=0).abs().max() / x.double().std(dim=0).max().clamp_min(1e-12) for x in pair(sets, name))
    loose = float32_mean and float(max(a, b)) > 100
    rel = 1e-4 if loose else 1e-6
    # Sets whose distance is nothing are compared absolutely.
    assert found == pytest.approx(expected, rel=rel, abs=1e-6)


def neighbours(sets: Sets, path: tuple[str, ...], expected: float, tree: dict) -> None:
    _, name, k, what = path
    found = precision_recall(*pair(sets, name), k=int(k))
    ours = {"generated_a_in_real_b": found.precision, "real_b_in_generated_a": found.recall}[what]
    assert ours == pytest.approx(expected, abs=1e-12)


def prdc(sets: Sets, path: tuple[str, ...], expected: float, tree: dict) -> None:
    _, name, k, what = path
    a, b = pair(sets, name)
    if what in ("precision", "recall"):
        ours = getattr(precision_recall(a, b, k=int(k), strict=True), what)
    else:
        ours = getattr(coverage(a, b, k=int(k)), what)
    if torch.equal(a, b) and what == "density":
        assert 1 - 1 / int(k) - 1e-9 <= ours <= 1 + 1e-9
        return
    assert ours == pytest.approx(expected, abs=1e-9)


def subsets_of(word: str) -> dict[str, int]:
    return {"subsets": int(re.search(KID_SUBSETS, word)[1]), "seed": int(re.search(KID_SEED, word)[1])}


def kernel(sets: Sets, path: tuple[str, ...], expected: Any, tree: dict) -> None:
    _, name, word = path
    a, b = pair(sets, name)
    about = tree["kid"][name]
    size = about["subset_size"]
    # Sets of one distribution give values around 0, so the tolerance is of the kernel's own size.
    floor = {"rel": 2e-3, "abs": 2e-4}
    if word.startswith("torchmetrics"):
        assert kid(a[:size], b[:size]).mean == pytest.approx(expected, **floor)
        return
    if word.startswith("clean_fid"):
        found = kid_subsets(a, b, subset_size=size, second_first=True, **subsets_of(word))
        assert found.mean == pytest.approx(expected, **floor)
        return
    if word.endswith("rbf10"):
        poly = next(w for w in about if w.startswith("torch_fidelity_poly"))
        found = kid_subsets(a, b, subset_size=size, kernel="gaussian", **subsets_of(poly))
        floor["abs"] = 1e-5
    else:
        found = kid_subsets(a, b, subset_size=size, **subsets_of(word))
    assert [found.mean, found.std] == pytest.approx(expected, **floor)


def unit_norm(sets: Sets, path: tuple[str, ...], expected: float, tree: dict) -> None:
    assert cmmd(*pair(sets, path[1])) == pytest.approx(expected, rel=1e-3, abs=2e-4)


def shuffled(sets: Sets, path: tuple[str, ...], expected: list[float], tree: dict) -> None:
    logits = sets[path[1]]
    splits, shuffle, seed = map(int, re.fullmatch(r"splits(\d+)_shuffle(\d)_seed(\d+)", path[2]).groups())
    found = inception_score(logits, splits_shuffled(len(logits), splits=splits, shuffle=bool(shuffle), seed=seed))
    assert [found.mean, found.std] == pytest.approx(expected, abs=1e-9, rel=1e-9)


def activations(sets: Sets) -> Tensor:
    return sets["is.acts"] @ sets["is.weight"]


def in_order(sets: Sets, path: tuple[str, ...], expected: float, tree: dict) -> None:
    logits = activations(sets)
    found = inception_score(logits, splits_in_order(len(logits), size=int(path[2])))
    assert found.mean == pytest.approx(expected, rel=1e-5)


def one_split(sets: Sets, path: tuple[str, ...], expected: list[float], tree: dict) -> None:
    logits = activations(sets)
    splits = int(path[1].rpartition("splits")[2])
    found = inception_score(logits, splits_shuffled(len(logits), splits=splits, shuffle=False))
    assert [found.mean, found.std] == pytest.approx(expected, rel=1e-6, abs=1e-9)


RULES: dict[str, Check | None] = {
    r"fid/[^/]+/[^/]+": distance,
    r"statistics_dtypes/[^/]+": INFORMATIVE,
    r"precision_recall/[^/]+/\d+/(generated_a_in_real_b|real_b_in_generated_a)": neighbours,
    r"precision_recall/[^/]+/\d+/torch_fidelity.*": INFORMATIVE,
    r"precision_recall/[^/]+/adm_evaluator.*": INFORMATIVE,
    r"prdc/[^/]+/\d+/(precision|recall|density|coverage)": prdc,
    r"kid/[^/]+/subset_size": INFORMATIVE,
    r"kid/[^/]+/(torch_fidelity_(poly|rbf)|clean_fid|torchmetrics).*": kernel,
    r"cmmd/[^/]+/unit_norm_rows": unit_norm,
    r"inception_score/[^/]+/splits\d+_shuffle\d_seed\d+": shuffled,
    r"inception_score/adm_evaluator[^/]*/\d+": in_order,
    r"inception_score/torch_fidelity[^/]*splits\d+": one_split,
}


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key, value in tree.items():
        yield from leaves(value, (*path, key))


def folder(config: pytest.Config) -> Path:
    return Path(config.getoption("--fixtures")) / NAME


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = folder(metafunc.config)
    if "path" in metafunc.fixturenames:
        tree = json.loads((root / "expected.json").read_text())
        metafunc.parametrize("path", [p for p, _ in leaves(tree)], ids="/".join)
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(root / "outputs.safetensors")))


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Path:
    return folder(request.config)


@pytest.fixture(scope="module")
def sets(root: Path) -> Sets:
    return load_file(root / "inputs.safetensors")


@pytest.fixture(scope="module")
def expected(root: Path) -> dict:
    return json.loads((root / "expected.json").read_text())


def test_expected_number_follows_its_rule(path: tuple[str, ...], sets: Sets, expected: dict) -> None:
    rules = [rule for pattern, rule in RULES.items() if re.fullmatch(pattern, "/".join(path))]
    assert len(rules) == 1, f"{'/'.join(path)} has {len(rules)} rules"
    value: Any = expected
    for key in path:
        value = value[key]
    if rules[0] is not INFORMATIVE:
        rules[0](sets, path, value, expected)


def test_statistics_equal_the_reference(output: str, root: Path, sets: Sets) -> None:
    name, _, word = output.rpartition(".")
    what, side = re.fullmatch(r"(mu|sigma)_([ab])", word).groups()
    features = sets[f"{name}.{side}"]
    wanted = load_file(root / "outputs.safetensors")[output]
    streamed = Moments(features.shape[1])
    for part in features.split(7):
        streamed.update(part)
    for found in (Statistics.of(features), streamed.result()):
        ours = found.mean if what == "mu" else found.covariance
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


def test_every_set_is_used(sets: Sets, expected: dict) -> None:
    named = {name for part in ("fid", "prdc", "kid") for name in expected[part]} | set(expected["inception_score"])
    assert {n for n in sets if n.rpartition(".")[0] not in named and n not in named} <= {"is.acts", "is.weight"}
