"""GenEval's rules, crops, colours, detector post-processing and summary: fixture ``geneval_score``."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from eval import geneval
from eval.geneval import colors, files, mask2former, prompts
from eval.geneval.rules import Detection, Options, judge
from eval.geneval.scoring import summarise, summary_text

NAME = "geneval_score"
FILES = {
    *("README.md", "cases.json", "config.json", "crops.safetensors", "mask2former_post.safetensors"),
    *("summary_expected.txt", "summary_results.jsonl", "zero_shot.safetensors"),
}


def folder(config: pytest.Config) -> Path:
    return Path(config.getoption("--fixtures")) / NAME


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = folder(metafunc.config)
    if "case" in metafunc.fixturenames:
        cases = json.loads((root / "cases.json").read_text())["cases"]
        metafunc.parametrize("case", cases, ids=[str(c["id"]) for c in cases])
    if "picture" in metafunc.fixturenames:
        metafunc.parametrize("picture", [k for k in load_file(root / "crops.safetensors") if "." in k])


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Path:
    return folder(request.config)


@pytest.fixture(scope="module")
def config(root: Path) -> dict:
    return json.loads((root / "config.json").read_text())


def options_of(tree: dict[str, Any]) -> Options:
    known = {f.name for f in dataclasses.fields(Options)}
    assert set(tree) <= known, f"no rule for {sorted(set(tree) - known)}"
    return Options(**{k: bool(int(v)) if k == "crop" else v for k, v in tree.items()})


def test_every_file_has_a_test(root: Path) -> None:
    assert {p.name for p in root.iterdir()} <= FILES


def test_names_and_defaults(root: Path, config: dict) -> None:
    tree = json.loads((root / "cases.json").read_text())
    assert set(tree) <= {"classes", "colors", "cases"}
    assert (tree["classes"], tree["colors"]) == (list(prompts.CLASSES), list(prompts.COLORS))
    assert set(config) <= {"defaults", "crops", "zero_shot", "mask2former_post"}
    assert options_of(config["defaults"]) == Options()


def as_sets(reason: str) -> list[Any]:
    """Lines of a reason, with joined relations as sets: the reference's order is arbitrary there."""
    out = []
    for line in reason.split("\n"):
        found = re.fullmatch(r"(expected .* target, found )(.*)( target)", line)
        out.append((found[1], frozenset(found[2].split(" and "))) if found else line)
    return out


def test_verdict(case: dict) -> None:
    assert set(case) <= {"id", "metadata", "detections", "options", "expected"}
    asked: list[str] = []
    found = []
    for d in case["detections"]:
        assert set(d) <= {"class", "box", "score", "color"}
        box = np.asarray(d["box"], dtype=np.float32)
        found.append(Detection(name=d["class"], box=box, score=d["score"], color=d.get("color")))

    def classify(name: str, objects: Any) -> list[str]:
        asked.append(name)
        return colors.color_of(objects)

    ours = judge(case["metadata"], found, classify=classify, options=options_of(case.get("options", {})))
    expected = case["expected"]
    assert set(expected) <= {"correct", "reason", "details", "color_calls"}
    assert ours.correct == expected["correct"]
    assert as_sets(ours.reason) == as_sets(expected["reason"])
    assert ours.details == expected["details"]
    assert asked == expected["color_calls"]


def test_detections_from_a_file_give_the_same(root: Path, tmp_path: Path) -> None:
    cases = [c for c in json.loads((root / "cases.json").read_text())["cases"] if not c.get("options")]
    lines = [json.dumps({"filename": str(c["id"]), "detections": c["detections"]}) for c in cases]
    (tmp_path / "detections.jsonl").write_text("\n".join(lines))
    result = geneval.score(
        files.read_detections(tmp_path / "detections.jsonl"), {str(c["id"]): c["metadata"] for c in cases}
    )
    assert [p.correct for p in result.pictures] == [c["expected"]["correct"] for c in cases]


CROPS = {
    "default": Options(),
    "bg_original": Options(bgcolor="original"),
    "bg_black": Options(bgcolor="black"),
    "no_crop": Options(crop=False),
    "no_mask": Options(),
}


def test_crop(picture: str, root: Path, config: dict) -> None:
    tensors = load_file(root / "crops.safetensors")
    kind, _, number = picture.partition(".")
    assert kind in CROPS, f"{picture} has no rule"
    mask = None if kind == "no_mask" else tensors["masks"][int(number)].numpy().astype(bool)
    one = Detection(name="", box=tensors["boxes"][int(number)].numpy(), score=1.0, mask=mask)
    ours = np.asarray(colors.crop(Image.fromarray(tensors["image"].numpy()), one, CROPS[kind]))
    assert list(ours.shape) == config["crops"][picture]
    assert np.array_equal(ours, tensors[picture].numpy())


def test_crop_inputs_are_known(root: Path, config: dict) -> None:
    tensors = load_file(root / "crops.safetensors")
    assert {k for k in tensors if "." not in k} == {"image", "boxes", "masks"}
    assert {k: list(v.shape) for k, v in tensors.items()} == config["crops"]


def test_zero_shot(root: Path, config: dict) -> None:
    tensors = load_file(root / "zero_shot.safetensors")
    assert set(tensors) == {"text_features", "image_features", "classifier", "logits"}
    about = config["zero_shot"]
    assert set(about) <= {"class", "prompts", "predicted"}
    assert colors.class_prompts(about["class"]) == about["prompts"]
    vectors = colors.classifier(tensors["text_features"])
    torch.testing.assert_close(vectors, tensors["classifier"], atol=1e-5, rtol=0)
    logits = colors.logits_of(tensors["image_features"], vectors)
    torch.testing.assert_close(logits, tensors["logits"], atol=1e-3, rtol=0)
    assert [prompts.COLORS[i] for i in logits.argmax(dim=1)] == about["predicted"]


def test_classifier_asks_for_the_same_sentences(root: Path, config: dict) -> None:
    tensors = load_file(root / "zero_shot.safetensors")
    about = config["zero_shot"]
    seen: list[str] = []

    def texts(sentences: list[str]) -> Tensor:
        seen.extend(sentences)
        return tensors["text_features"].flatten(0, 1)

    rows = iter(tensors["image_features"])
    ask = colors.ColorClassifier(texts, lambda _: next(rows)[None], "given")
    one = Detection(name=about["class"], box=np.array([0, 0, 4, 4], dtype=np.float32), score=1.0)
    found = ask(Image.new("RGB", (4, 4)), about["class"], [one] * len(about["predicted"]), Options())
    assert found == about["predicted"]
    assert seen == [text for row in about["prompts"] for text in row]


def test_mask2former(root: Path, config: dict) -> None:
    tensors = load_file(root / "mask2former_post.safetensors")
    assert set(tensors) == {"class_logits", "mask_logits", "scores", "labels", "boxes", "masks_packed"}
    about = config["mask2former_post"]
    known = {"num_queries", "max_per_image", "batch_input_shape", "img_shape", "ori_shape", "empty_masks"}
    assert set(about) <= known
    assert len(tensors["class_logits"]) == about["num_queries"]
    height, width = about["ori_shape"]
    ours = mask2former.instances(
        tensors["class_logits"],
        tensors["mask_logits"],
        padded=tuple(about["batch_input_shape"]),
        fitted=tuple(about["img_shape"]),
        original=(height, width),
        most=about["max_per_image"],
    )
    torch.testing.assert_close(ours.scores, tensors["scores"], atol=1e-6, rtol=0)
    real = tensors["scores"] > 0  # rows with score 0 are empty masks in arbitrary order
    packed = np.packbits(ours.masks.flatten(1).numpy(), axis=1)
    assert torch.equal(ours.labels[real], tensors["labels"][real])
    assert torch.equal(ours.boxes[real], tensors["boxes"][real])
    assert np.array_equal(packed[real.numpy()], tensors["masks_packed"].numpy()[real.numpy()])
    for got, want in ((ours.labels, tensors["labels"]), (ours.boxes, tensors["boxes"])):
        assert sorted(got[~real].tolist()) == sorted(want[~real].tolist())
    assert not ours.masks[~real].any()


def test_summary(root: Path, tmp_path: Path) -> None:
    pictures = files.read_results(root / "summary_results.jsonl")
    expected = (root / "summary_expected.txt").read_text()
    assert summary_text(summarise(pictures)) == expected.rstrip("\n")
    again = files.read_results(files.write_results(tmp_path / "results.jsonl", pictures))
    assert again == pictures


@pytest.fixture
def text_of_the_prompts() -> Callable[[], str]:
    return lambda: prompts.metadata_lines(prompts.official_prompts())


def test_the_553_prompts_are_made_again(text_of_the_prompts) -> None:
    lines = text_of_the_prompts().splitlines()
    tags = [json.loads(line)["tag"] for line in lines]
    counts = {tag: tags.count(tag) for tag in dict.fromkeys(tags)}
    assert counts == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
