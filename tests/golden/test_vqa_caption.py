"""VQAv2 accuracy and COCO caption scores against the published tools: fixture ``vqa_caption``.

Strings are exact and scores from tokenised text within 1e-9. METEOR is compared where its Java program is installed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from eval import caption, vqa
from eval.contractions import CONTRACTIONS
from eval.ptb import tokenise
from mmdiff.errors import MmdiffError

NAME = "vqa_caption"
FILES = {"caption_scores", "contractions", "ptb_tokenise", "vqa_accuracy", "vqa_normalise"}
has_java = shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None


def folder(config: pytest.Config) -> Path:
    return Path(config.getoption("--fixtures")) / NAME


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = folder(metafunc.config)
    if "corpus" in metafunc.fixturenames:
        metafunc.parametrize("corpus", list(json.loads((root / "caption_scores.json").read_text())))


@pytest.fixture(scope="module")
def load(request: pytest.FixtureRequest) -> Any:
    root = folder(request.config)

    def read(name: str) -> Any:
        path = root / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    return read


def test_every_file_has_a_test(request: pytest.FixtureRequest) -> None:
    assert {p.stem for p in folder(request.config).glob("*.json")} <= FILES


def test_contractions(load) -> None:
    table = load("contractions")
    if table is not None:  # in the developers' set only
        assert table == CONTRACTIONS


def test_normalised_answers(load) -> None:
    tree = load("vqa_normalise")
    assert set(tree) == {"cases"}
    for case in tree["cases"]:
        text = case["text"]
        ours = {
            "text": text,
            "punctuation": vqa.strip_punctuation(text),
            "full": vqa.normalise_vqav2(text),
            "lmms_punctuation": vqa.strip_punctuation(text, variant="lmms-eval"),
            "evalai_word_tokenize_then_full": vqa.normalise_vqav2(text, variant="evalai"),
        }
        for key, expected in case.items():
            assert key in ours, f"{key} has no rule"
            assert ours[key] == expected, (text, key)


def test_accuracy_of_each_question(load) -> None:
    tree = load("vqa_accuracy")
    assert set(tree) <= {"overall", "per_question_type", "per_answer_type", "questions"}
    for question in tree["questions"]:
        raw, said = [a["answer"] for a in question["answers"]], question["prediction"]
        official = vqa.vqav2_accuracy(said, question["answers"])
        always = vqa.vqav2_accuracy(said, question["answers"], normalise=True)
        ours = {
            "official_accuracy_percent_2dp": round(100 * official, 2),
            "processed_prediction_official": vqa.vqav2_cleaner(raw)(said),
            "lmms_eval_accuracy": pytest.approx(always, abs=1e-9),
            "lmms_eval_processed_prediction": vqa.vqav2_cleaner(raw, normalise=True)(said),
        }
        inputs = {"question_id", "prediction", "answers", "question_type", "answer_type"}
        for key in set(question) - inputs:
            assert key in ours, f"{key} has no rule"
            assert question[key] == ours[key], (question["question_id"], key)


def test_accuracy_overall_and_by_type(load) -> None:
    tree = load("vqa_accuracy")
    questions = tree["questions"]
    scores = [vqa.vqav2_accuracy(q["prediction"], q["answers"]) for q in questions]
    result = vqa.summarise(scores, questions, protocol="vqav2")
    assert round(100 * result.accuracy, 2) == tree["overall"]
    assert {k.kind: round(100 * k.accuracy, 2) for k in result.kinds} == tree["per_question_type"]
    assert {k.kind: round(100 * k.accuracy, 2) for k in result.answer_types} == tree["per_answer_type"]


def test_public_score_takes_what_has_ids_and_refuses_the_rest(load) -> None:
    def distinct(question: dict) -> bool:
        ids = [a.get("answer_id") for a in question["answers"]]
        return None not in ids and len(set(ids)) == len(ids)

    groups = {True: [], False: []}
    for question in load("vqa_accuracy")["questions"]:
        groups[distinct(question)].append(question)
    given = {q["question_id"]: q["prediction"] for q in groups[True]}
    for protocol, key, scale in (
        ("vqav2", "official_accuracy_percent_2dp", 100),
        ("vqav2-normalised", "lmms_eval_accuracy", 1),
    ):
        result = vqa.score(given, groups[True], protocol=protocol)
        assert [scale * s for s in result.scores] == pytest.approx([q[key] for q in groups[True]], abs=0.005)
    for question in groups[False]:
        with pytest.raises(vqa.ConfigError, match=re.escape(str(question["question_id"]))):
            vqa.score([question["prediction"]], [question], protocol="vqav2")


def test_tokens_of_captions(load, record_property) -> None:
    cases = load("ptb_tokenise")["cases"]
    assert {c["group"] for c in cases} <= {"natural", "exotic"}
    assert all(set(c) == {"text", "tokens", "group"} for c in cases)
    missed = Counter(c["group"] for c in cases if " ".join(tokenise(c["text"])) != c["tokens"])
    wrong = [(c["text"], c["tokens"], " ".join(tokenise(c["text"]))) for c in cases if c["group"] == "natural"]
    assert not [w for w in wrong if w[1] != w[2]]
    record_property("exotic_missed", missed["exotic"])


def test_tokens_of_a_corpus(corpus: str, load) -> None:
    tree = load("caption_scores")[corpus]
    for image, text in tree["candidates"].items():
        assert " ".join(tokenise(text)) == tree["tokenised_candidates"][image]
    for image, texts in tree["references"].items():
        assert [" ".join(tokenise(t)) for t in texts] == tree["tokenised_references"][image]


@pytest.mark.parametrize("protocol", ["tokenised", "coco"])
def test_scores_of_a_corpus(corpus: str, protocol: str, load) -> None:
    tree = load("caption_scores")[corpus]
    head = "tokenised_" if protocol == "tokenised" else ""
    references = tree[f"{head}references"]
    result = caption.score(tree[f"{head}candidates"], references, protocol=protocol)
    images = list(references)
    ours = {
        "CIDEr": result.cider,
        "CIDEr_per_image": dict(zip(images, result.cider_per_image, strict=True)),
        "Bleu": list(result.bleu),
        "Bleu_per_image": {i: list(b) for i, b in zip(images, result.bleu_per_image, strict=True)},
        "ROUGE_L": result.rouge_l,
        "ROUGE_L_per_image": dict(zip(images, result.rouge_l_per_image, strict=True)),
    }
    inputs = {"references", "candidates", "tokenised_references", "tokenised_candidates"}
    java = {"METEOR", "METEOR_per_image"}
    for key in set(tree) - inputs - java:
        assert key in ours, f"{key} has no rule"
        if key == "Bleu_per_image":
            for image, values in tree[key].items():
                assert ours[key][image] == pytest.approx(values, abs=1e-9)
        else:
            assert ours[key] == pytest.approx(tree[key], abs=1e-9), key


def test_meteor_and_the_java_tokeniser(corpus: str, load) -> None:
    tree = load("caption_scores")[corpus]
    if not has_java:  # METEOR is a Java program: without it the answer is how to get it, never a number
        with pytest.raises(MmdiffError, match=r"Java|mmdiff\[coco\]"):
            caption.score(tree["candidates"], tree["references"], meteor=True)
        return
    result = caption.score(tree["candidates"], tree["references"], protocol="coco-java", meteor="METEOR" in tree)
    assert result.cider == pytest.approx(tree["CIDEr"], abs=1e-9)
    if "METEOR" in tree:
        assert result.meteor == pytest.approx(tree["METEOR"], abs=1e-9)
        found = dict(zip(tree["references"], result.meteor_per_image, strict=True))
        assert found == pytest.approx(tree["METEOR_per_image"], abs=1e-9)
