"""Our numbers beside the published packages' on drawn data, where those are installed (they are no dependency)."""

from __future__ import annotations

import contextlib
import io
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval import caption, fid
from eval.inception import Inception
from eval.inception_score import inception_score, splits_shuffled
from eval.kid import kid_subsets
from eval.neighbours import coverage, precision_recall
from eval.statistics import Statistics
from mmdiff.rng import generator

pytestmark = pytest.mark.slow


def draw(n: int, dim: int, seed: int) -> torch.Tensor:
    gen = generator(seed, "parity")
    return torch.randn(n, dim, generator=gen) @ torch.randn(dim, dim, generator=gen) / dim**0.5


def test_torch_fidelity_metrics_on_features() -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = draw(300, 24, 0), draw(250, 24, 1)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    assert fid.score(a, b).fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    kernel = kid_features_to_metric(a, b, kid_subsets=5, kid_subset_size=100, verbose=False)
    ours = kid_subsets(a, b, subsets=5, subset_size=100)
    assert ours.mean == pytest.approx(kernel["kernel_inception_distance_mean"], rel=2e-3, abs=1e-5)
    logits = draw(120, 30, 2)
    told = isc_features_to_metric(logits)
    assert inception_score(logits, splits_shuffled(120)).mean == pytest.approx(told["inception_score_mean"], rel=1e-9)


def test_pytorch_fid_on_features() -> None:
    pytest.importorskip("pytorch_fid")
    from pytorch_fid.fid_score import calculate_frechet_distance

    a, b = draw(300, 24, 0).double().numpy(), draw(250, 24, 1).double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls SciPy in a way that SciPy is about to drop
        theirs = calculate_frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    ours = fid.frechet_distance(Statistics.of(torch.from_numpy(a)), Statistics.of(torch.from_numpy(b)))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_prdc_on_features() -> None:
    prdc = pytest.importorskip("prdc")
    a, b = draw(200, 12, 0), draw(150, 12, 1)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = prdc.compute_prdc(real_features=b.double().numpy(), fake_features=a.double().numpy(), nearest_k=5)
    pairs, dense = precision_recall(a, b, k=5, strict=True), coverage(a, b, k=5)
    ours = {"precision": pairs.precision, "recall": pairs.recall, "density": dense.density, "coverage": dense.coverage}
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_torch_fidelity_from_files_to_numbers(tmp_path: Path) -> None:
    """The whole way: the same PNG files, the same weights, both programs."""
    torch_fidelity = pytest.importorskip("torch_fidelity")
    net = Inception()
    gen = generator(0, "weights")
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    for key, value in state.items():
        if value.ndim > 1:
            state[key] = 1.4 / value[0].numel() ** 0.5 * torch.randn(value.shape, generator=gen)
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    rows = torch.randint(0, 256, (36, 40, 40, 3), generator=gen, dtype=torch.uint8).numpy()
    for name, part in (("a", rows[:20]), ("b", rows[20:] // 2)):
        (tmp_path / name).mkdir()
        for i, row in enumerate(part):
            Image.fromarray(row).save(tmp_path / name / f"{i:05d}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), cuda=False, fid=True, isc=True, verbose=False,
        batch_size=8, save_cpu_ram=True, feature_extractor_weights_path=str(path), cache=False,
    )  # fmt: skip
    ours = fid.compare(
        tmp_path / "a", tmp_path / "b", features=f"inception:{path}", protocol="torch-fidelity", measures=("isc",)
    )
    assert ours.fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours.isc_mean == pytest.approx(theirs["inception_score_mean"], rel=1e-5)


def test_coco_tool_on_captions() -> None:
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("the tool's tokeniser is a Java program")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    truths = {i: [{"caption": c} for c in pair] for i, pair in enumerate(TRUTHS)}
    given = {i: [{"caption": c}] for i, c in enumerate(GIVEN)}
    tokenizer = PTBTokenizer()
    references, candidates = tokenizer.tokenize(truths), tokenizer.tokenize(given)
    ours = caption.score(list(GIVEN), [list(pair) for pair in TRUTHS])
    assert ours.cider == pytest.approx(Cider().compute_score(references, candidates)[0], abs=1e-9)
    assert ours.rouge_l == pytest.approx(Rouge().compute_score(references, candidates)[0], abs=1e-9)


TRUTHS = (
    ("A man's dog (black & white) isn't running, is it?", "Two dogs run - one is 2-years-old."),
    ("Mr. Smith cooks a 12-inch pizza at 5 p.m.", "someone's gonna eat 1 1/2 pizzas!"),
    ("a t-shirt that costs $5.50; it's 50% off", "shirt on sale"),
    ("rock'n'roll band", "a band plays on St. Mary's street..."),
)
GIVEN = ("A black & white dog isn't running.", "Mr. Smith's pizza", "a t-shirt that costs $5.50", "the band plays")
