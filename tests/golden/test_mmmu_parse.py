"""MMMU's parsing, scoring and prompts against the published tools: fixture ``mmmu_parse``. All comparisons are exact.

Every key of every file has a rule; one without a rule fails.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval import mmmu
from eval.mmmu import llada_v, prompts
from eval.mmmu.data import options_of
from eval.mmmu.files import read_answers, read_predictions, read_tree
from eval.mmmu.parsing import extract_numbers, normalise, open_is_correct, parse_choice, parse_open
from eval.mmmu.scoring import format_table

NAME = "mmmu_parse"
PARSERS = {"official": "official", "lmms_eval": "lmms-eval", "mmmu_pro": "mmmu-pro"}


@pytest.fixture(scope="module")
def load(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    root = Path(request.config.getoption("--fixtures")) / NAME
    return lambda file: json.loads((root / f"{file}.json").read_text(encoding="utf-8"))


def only(found: Any, *known: str) -> None:
    assert set(found) <= set(known), f"no rule for {sorted(set(found) - set(known))}"


def test_every_file_has_a_test(request: pytest.FixtureRequest) -> None:
    root = Path(request.config.getoption("--fixtures")) / NAME
    files = {p.stem for p in root.glob("*.json")}
    known = {"aggregation", "llada_v_wrapper", "multiple_choice", "open", "parse_tree", "prompts"}
    assert files <= known, f"no rule for {sorted(files - known)}"


@pytest.mark.parametrize("parser", PARSERS)
def test_multiple_choice(parser: str, load) -> None:
    tree = load("multiple_choice")
    only(tree, "seed", "option_sets", "cases")
    draw = random.Random(tree["seed"]).choice
    for case in tree["cases"]:
        only(case, "id", "response", "options", "answer", *PARSERS)
        options = tree["option_sets"][case["options"]]
        found = parse_choice(case["response"], options, variant=PARSERS[parser], draw=draw)
        ours = {"pred": found.letter, "fallback": found.fallback, "correct": found.letter == case["answer"]}
        assert ours == case[parser], (case["id"], case["response"])


def split(parsed: list[Any]) -> tuple[list[str], list[str]]:
    texts = sorted(p for p in parsed if isinstance(p, str))
    return texts, sorted(repr(p) for p in parsed if isinstance(p, float))


def test_open_questions(load) -> None:
    for case in load("open")["cases"]:
        only(
            case,
            *("id", "response", "gold", "extract_numbers", "normalize_str"),
            *("parsed_strings", "parsed_numbers", "correct"),
        )
        response = case["response"]
        assert extract_numbers(response) == case["extract_numbers"], response
        ours = [{"float": repr(x)} if isinstance(x, float) else x for x in normalise(response)]
        assert ours == case["normalize_str"], response
        parsed = parse_open(response)
        assert split(parsed) == (sorted(case["parsed_strings"]), sorted(case["parsed_numbers"])), response
        assert open_is_correct(parsed, case["gold"]) == case["correct"], response


def rounded(result: mmmu.MmmuResult, digits: int) -> dict[str, Any]:
    return {row.name: {"num": row.num, "acc": round(row.acc, digits)} for row in result.table}


def test_aggregation(load, tmp_path: Path) -> None:
    tree = load("aggregation")
    only(
        tree,
        *("answers", "predictions", "official_table", "official_skipped_subjects"),
        *("lmms_eval_table", "lmms_eval_overall"),
    )
    (tmp_path / "answers.json").write_text(json.dumps(tree["answers"]))
    (tmp_path / "predictions.json").write_text(json.dumps(tree["predictions"]))
    references = read_answers(tmp_path / "answers.json")
    predictions = read_predictions(tmp_path / "predictions.json")
    result = mmmu.score(predictions, references, protocol="answers", incomplete=True)
    assert rounded(result, 3) == tree["official_table"]
    assert list(rounded(result, 3)) == list(tree["official_table"])
    assert rounded(result, 5) == tree["lmms_eval_table"]
    assert round(result.table[-1].acc, 5) == tree["lmms_eval_overall"]
    assert result.accuracy == pytest.approx(result.table[-1].acc, abs=1e-12)
    scored = {row.name for row in result.table}
    asked = {mmmu.subjects.subject_of(i) for i in tree["answers"]}
    assert asked - scored == {s for s in tree["official_skipped_subjects"] if s in asked}


def test_tree_of_responses(load, tmp_path: Path) -> None:
    tree = load("parse_tree")
    only(tree, "seed", "subject_order", "outputs", "expected", "printed_table")
    for subject, rows in tree["outputs"].items():
        (tmp_path / subject).mkdir()
        (tmp_path / subject / "output.json").write_text(json.dumps(rows))
    predictions, references = read_tree(tmp_path)
    assert list(dict.fromkeys(r["subject"] for r in references)) == tree["subject_order"]
    result = mmmu.score(predictions, references, seed=tree["seed"])
    mmmu.files.write_tree(tmp_path / "ours", [row for s in tree["subject_order"] for row in tree["outputs"][s]], result)
    for subject, expected in tree["expected"].items():
        only(expected, "parsed", "result")
        folder = tmp_path / "ours" / subject
        assert json.loads((folder / "result.json").read_text()) == expected["result"]
        assert json.loads((folder / "output.json").read_text()) == tree["outputs"][subject]
        written = json.loads((folder / "parsed_output.json").read_text())
        assert len(written) == len(expected["parsed"])
        for ours, theirs in zip(written, expected["parsed"], strict=True):
            only(theirs, "id", "parsed_pred", "judge")
            assert (ours["id"], ours["judge"]) == (theirs["id"], theirs["judge"])
            if isinstance(theirs["parsed_pred"], str):
                assert ours["parsed_pred"] == theirs["parsed_pred"]
            else:
                texts, numbers = split([float(x) if isinstance(x, int) else x for x in ours["parsed_pred"]])
                assert texts == sorted(theirs["parsed_pred"]["strings"])
                assert numbers == sorted(theirs["parsed_pred"]["numbers"])
    assert format_table(result.table) == tree["printed_table"].strip("\n")


def pro(prompt: prompts.Prompt) -> dict[str, Any]:
    order = [int(name.removeprefix("image_")) for name in prompt.images]
    return {"text": prompt.text, "image_order": order, "images": list(prompt.images)}


def test_prompts(load) -> None:
    tree = load("prompts")
    only(tree, "cases", "mmmu_pro_vision_prompts", "lmms_eval_replace_image_tokens")
    for case in tree["cases"]:
        document = case["doc"] | {"options": options_of(case["doc"]["options"], case["doc"]["id"])}
        ask = {name: build(document) for name, build in prompts.PROMPTS.items()}
        chosen = document["question_type"] == "multiple-choice"
        answer = document["answer"]
        rules = {
            "doc": case["doc"],
            "official_llava15": ask["official"].text,
            "official_gt_content": document["options"][ord(answer) - ord("A")] if chosen else answer,
            "lmms_eval_text": ask["lmms-eval"].text,
            "lmms_eval_images": list(ask["lmms-eval"].images),
            "lmms_eval_pro_text": ask["lmms-eval-pro"].text,
            "mmmu_pro_direct": pro(ask["pro-direct"]),
            "mmmu_pro_cot": pro(ask["pro-cot"]),
        }
        only(case, *rules)
        for key, expected in case.items():
            assert rules[key] == expected, (case["doc"]["id"], key)
    for style, text in tree["mmmu_pro_vision_prompts"].items():
        assert prompts.vision_prompt(style) == text
    for given, expected in tree["lmms_eval_replace_image_tokens"]:
        assert prompts.interleaved(given) == expected


def test_llada_v_wrapper(load) -> None:
    tree = load("llada_v_wrapper")
    only(tree, "cases")
    for case in tree["cases"]:
        images, settings = case["num_images"], case["gen_kwargs"]
        one = [m for c in tree["cases"] if c["num_images"] == 1 for m in c["image_aspect_ratio_used"]]
        rules = {
            "context": case["context"],
            "num_images": images,
            "gen_kwargs": settings,
            "user_message": llada_v.user_message(case["context"], images, settings),
            "image_aspect_ratio_used": [llada_v.aspect_ratio(images, one[0])] if images else [],
            "model_generate_kwargs": llada_v.generation_words(settings, images=images),
            "decoded": case["decoded"],
            "response": llada_v.final_response(case["decoded"]),
        }
        only(case, *rules)
        for key, expected in case.items():
            assert rules[key] == expected, (case["context"], key)


def test_not_a_number_is_kept_apart() -> None:
    assert math.isnan(parse_open("nan")[0])
    assert not open_is_correct(parse_open("nan"), "nan")
