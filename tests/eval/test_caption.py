"""Caption scores against values of the published tool, and attributes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import caption
from mmdiff.errors import ConfigError

# Captions and scores of the COCO tool (pycocoevalcap 1.2): empty, short and repeated candidates.
EDGE = {
    "references": {"0": ["a dog runs"], "1": ["cat"], "2": ["two birds", "two birds fly"], "3": ["a red bus parked"]},
    "candidates": {"0": "", "1": "cat", "2": "birds", "3": "a red bus parked a red bus parked a red bus parked"},
    "cider": (0.0, 2.5, 1.554379617399816, 1.171656492177195),
    "bleu": (0.42857142854081637, 0.3418817293511638, 0.28593057213502493, 0.22575366914902234),
    "rouge_l": (0.0, 1.0, 0.6288659793814433, 0.5495495495495495),
}


def test_scores_equal_the_published_tool_on_tokenised_captions() -> None:
    got = caption.score(EDGE["candidates"], EDGE["references"], protocol="tokenised")
    assert got.cider_per_image == pytest.approx(EDGE["cider"], abs=1e-9)
    assert got.bleu == pytest.approx(EDGE["bleu"], abs=1e-9)
    assert got.rouge_l_per_image == pytest.approx(EDGE["rouge_l"], abs=1e-9)


def test_one_image_alone_has_no_cider() -> None:
    got = caption.score(["a dog is running"], [["a dog runs", "the dog is running fast"]], protocol="tokenised")
    assert got.cider == 0
    assert got.rouge_l == pytest.approx(0.6984732824427481, abs=1e-9)
    assert got.bleu[3] == pytest.approx(0.00014953487804423936, abs=1e-12)


def test_equal_captions_score_best() -> None:
    truths = ["red apple on a table", "woman running: dark skin tone", "blue car in the street"]
    got = caption.score([t.upper() + "." for t in truths], [[t] for t in truths])
    assert got.exact == 1
    assert got.cider == pytest.approx(10, abs=1e-9)
    assert got.rouge_l == pytest.approx(1)


def test_attributes_are_read_from_captions() -> None:
    assert caption.attributes("woman running: medium-dark skin tone") == {"tone": "medium-dark", "gender": "female"}
    assert caption.attributes("waving hand: light skin tone") == {"tone": "light"}
    assert caption.attributes("woman and man holding hands")["gender"] == "both"
    assert caption.attributes("a light bulb in a human hand, medium size") == {}


def test_attribute_accuracy_by_hand() -> None:
    truths = ["man: dark skin tone", "woman: dark skin tone", "boy: light skin tone", "apple"]
    given = ["man: dark skin tone", "man: dark skin tone", "boy: dark skin tone", "man eating an apple"]
    tone, gender = caption.score(given, [[t] for t in truths]).attributes
    assert (tone.name, tone.n, tone.commonest) == ("tone", 3, "dark")
    assert tone.accuracy == pytest.approx(2 / 3)
    assert tone.macro_accuracy == pytest.approx(1 / 2)
    assert gender.accuracy == pytest.approx(2 / 3)
    assert (gender.false_positives, gender.n_without) == (1, 1)


def test_missing_and_unknown_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 of 4 image_ids missing, first 2"):
        caption.score({k: v for k, v in EDGE["candidates"].items() if k != "2"}, EDGE["references"])
    with pytest.raises(ConfigError, match="first 7"):
        caption.score({**EDGE["candidates"], "7": "x"}, EDGE["references"])
    with pytest.raises(ConfigError, match="no reference"):
        caption.score(["a"], [[]])


def test_command_gathers_references_of_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions, references = tmp_path / "p.json", tmp_path / "r.jsonl"
    predictions.write_text(json.dumps([{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}]))
    rows = [(1, "a dog"), (1, "one dog"), (2, "the cat")]
    references.write_text("\n".join(json.dumps({"image_id": i, "caption": c}) for i, c in rows))
    assert caption.main([str(predictions), str(references)]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] == 0.5
