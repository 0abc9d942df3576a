"""Answers: macro accuracy by hand, VQAv2's rules, ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import vqa
from mmdiff.errors import ConfigError

REFERENCES = [
    {"question_id": 1, "answer": "Red", "kind": "color"},
    {"question_id": 2, "answer": "red", "kind": "color"},
    {"question_id": 3, "answer": "red", "kind": "color"},
    {"question_id": 4, "answer": "blue", "kind": "color"},
    {"question_id": 5, "answer": "yes", "kind": "is it"},
    {"question_id": 6, "answer": "no", "kind": "is it"},
]


def ten(*answers: str) -> list[dict[str, object]]:
    return [{"answer": a, "answer_id": i} for i, a in enumerate(answers)]


def test_macro_accuracy_by_hand() -> None:
    got = vqa.score(["red.", " RED", "blue", "red", "yes", "yes"], REFERENCES)
    assert got.accuracy == pytest.approx(3 / 6)
    color, yes_no = got.kinds
    assert (color.kind, color.n, color.answers) == ("color", 4, 2)
    assert color.accuracy == pytest.approx(2 / 4)
    assert color.macro_accuracy == pytest.approx((2 / 3 + 0) / 2)
    assert (color.commonest, color.commonest_accuracy) == ("red", 0.75)
    assert yes_no.macro_accuracy == pytest.approx((1 + 0) / 2)
    assert got.macro_accuracy == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert got.commonest_accuracy == pytest.approx((3 + 1) / 6)
    assert got.scores == (1, 1, 0, 0, 1, 0)


def test_always_giving_the_commonest_answer_has_the_macro_accuracy_of_chance() -> None:
    got = vqa.score(["red"] * 4 + ["no"] * 2, REFERENCES)
    assert got.accuracy == pytest.approx(got.commonest_accuracy)
    assert [k.macro_accuracy for k in got.kinds] == pytest.approx([1 / k.answers for k in got.kinds])


def test_answers_by_id_do_not_depend_on_order() -> None:
    by_id = {r["question_id"]: r["answer"] for r in reversed(REFERENCES)}
    assert vqa.score(by_id, REFERENCES).accuracy == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:-1], "1 of 6 question_ids missing, first 6"),
        (lambda p: [*p, {"question_id": 9, "answer": "x"}], "first 9"),
        (lambda p: [*p, p[0]], "1 occurs more than once"),
        (lambda p: [{"answer": "x"}, *p[1:]], "record 0 has no question_id"),
    ],
    ids=["missing", "unknown", "doubled", "no_id"],
)
def test_ids_that_do_not_agree_are_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    predictions = [{"question_id": r["question_id"], "answer": "red"} for r in REFERENCES]
    with pytest.raises(ConfigError, match=message):
        vqa.score(change(predictions), REFERENCES)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The dogs.", "dogs"),
        ("two", "2"),
        ("none", "0"),
        ("isnt", "isn't"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("1,000", "1000"),
        ("3.14", "3.14"),
        ("black/white", "black white"),
        ("it's 5%\n", "it's 5%"),
        ("somebody'd", "somebodyd"),
        ("." * 33 + "x", ".x"),
    ],
)
def test_vqav2_normaliser(text: str, wanted: str) -> None:
    assert vqa.normalise_vqav2(text) == wanted


@pytest.mark.parametrize(("matches", "wanted"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_soft_accuracy_by_number_of_matches(matches: int, wanted: float) -> None:
    answers = ten(*["cat"] * matches, *["dog"] * (10 - matches))
    reference = [{"question_id": 1, "answers": answers, "question_type": "what"}]
    assert vqa.score(["cat"], reference, protocol="vqav2").accuracy == pytest.approx(wanted)


def test_unanimous_answers_are_not_normalised_in_the_official_protocol() -> None:
    reference = [{"question_id": 1, "answers": ten(*["yes"] * 10), "question_type": "is"}]
    assert vqa.score(["Yes"], reference, protocol="vqav2").accuracy == 0
    assert vqa.score(["Yes"], reference, protocol="vqav2-normalised").accuracy == 1


def test_answers_without_ids_are_refused() -> None:
    with pytest.raises(ConfigError, match="question 7: answers need distinct answer_id"):
        vqa.score(["x"], [{"question_id": 7, "answers": [{"answer": "x"}] * 10}], protocol="vqav2")


def test_command_reads_json_lines_and_names_a_bad_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions, references = tmp_path / "p.jsonl", tmp_path / "r.json"
    lines = [json.dumps({"question_id": r["question_id"], "answer": "red"}) for r in REFERENCES]
    predictions.write_text("\n".join(lines) + "\n")
    references.write_text(json.dumps({"annotations": REFERENCES}))
    assert vqa.main([str(predictions), str(references)]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(0.5)
    predictions.write_text("\n".join([*lines[:3], lines[3][:-5]]))
    assert vqa.main([str(predictions), str(references)]) == 2
    assert "line 4 is not JSON" in capsys.readouterr().err
