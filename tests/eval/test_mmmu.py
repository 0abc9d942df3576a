"""MMMU from questions to official files: real pictures, a tiny model, interruptions, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipelines.datasets import mmmu_format
from eval import mmmu
from eval.mmmu.data import answer_of, options_of, read_documents
from eval.mmmu.files import read_answers, read_predictions
from eval.mmmu.measuring import asked as asked_of
from eval.mmmu.subjects import DOMAINS, ORDER, SHORT_NAMES, subject_of, subjects_of
from mmdiff.cli import app
from mmdiff.commands.eval import evaluate
from mmdiff.errors import ConfigError
from mmdiff.pipelines import VisionLanguage


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    report = mmmu_format.build(folder, per_subject=3)
    assert report.counts["validation"] >= 15
    return folder


class Scripted:
    """A model that knows the truth of every other question, and can be stopped."""

    def __init__(self, truths: dict[str, str], stop_after: int | None = None) -> None:
        self.truths, self.stop_after, self.asked = truths, stop_after, []

    def ask(self, pictures, prompts, **words):  # type: ignore[no-untyped-def]
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += prompts
        return [self.truths.get(p, "no idea, sorry") for p in prompts]


def truths_of(questions: Path) -> dict[str, str]:
    documents = read_documents(questions)
    style = mmmu.STYLES["official"]
    asked = [(asked_of(d, style).prompt, d) for d in documents]
    return {prompt: str(d.answer) for i, (prompt, d) in enumerate(asked) if i % 2 == 0}


def test_a_run_writes_the_official_files_and_they_score_the_same(questions: Path, tmp_path: Path) -> None:
    done = mmmu.measure(Scripted(truths_of(questions)), questions, out=tmp_path / "run")
    assert 0.4 < done.result.accuracy < 0.8
    assert done.result.fallbacks > 0
    assert done.result.without_luck <= done.result.accuracy
    again = mmmu.score_files(tmp_path / "run" / "subjects")
    assert again.table == done.result.table
    answers = {d.id: {"question_type": d.question_type, "ground_truth": d.answer} for d in done.documents}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    letters = mmmu.score_files(tmp_path / "run" / "predictions.json", tmp_path / "answers.json")
    assert letters.table == done.result.table
    for path in (tmp_path / "run" / "subjects").glob("*/parsed_output.json"):
        judged = [row["judge"] == "Correct" for row in json.loads(path.read_text())]
        told = json.loads((path.parent / "result.json").read_text())
        assert told == {"acc": sum(judged) / len(judged), "num_example": len(judged)}


def test_an_interrupted_run_goes_on_and_gives_the_same(questions: Path, tmp_path: Path) -> None:
    truths = truths_of(questions)
    whole = mmmu.measure(Scripted(truths), questions, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        mmmu.measure(Scripted(truths, stop_after=5), questions, out=tmp_path / "cut")
    answers = tmp_path / "cut" / "answers-00000.jsonl"
    answers.write_bytes(answers.read_bytes()[:-7])  # killed in the middle of a line
    second = Scripted(truths)
    done = mmmu.measure(second, questions, out=tmp_path / "cut")
    assert done.result == whole.result
    assert len(second.asked) == len(whole.documents) - 4
    for name in ("predictions.json", "submission.json", "table.txt"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_settings_in_the_same_folder_are_refused(questions: Path, tmp_path: Path) -> None:
    mmmu.measure(Scripted({}), questions, out=tmp_path, limit=1)
    with pytest.raises(ConfigError, match="other settings"):
        mmmu.measure(Scripted({}), questions, out=tmp_path, limit=2)


@pytest.mark.parametrize("style", ["official", "llada-v"])
def test_a_tiny_model_runs_end_to_end_through_the_command(
    style: str, questions: Path, checkpoint: Path, tmp_path: Path
) -> None:
    words = ["eval", "mmmu", checkpoint, questions, "--out", tmp_path / "run", "--style", style, "--limit", 1]
    words += ["--device", "cpu", "--gen-length", 4, "--block-length", 4, "--steps", 2, "--compare", "published"]
    printed = CliRunner().invoke(app, [str(w) for w in words])
    assert printed.exit_code == 0, printed.output
    assert "Overall-Science" in printed.stdout
    assert "LLaDA-V 8B" in printed.stdout
    tree = json.loads((tmp_path / "run" / "result.json").read_text())
    assert tree["result"]["n"] == len(tree["items"]) == len(read_documents(questions)) // 3
    assert tree["hashes"]["checkpoint"]
    assert {"python", "torch", "mmdiff"} <= set(tree["versions"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<img" in page
    assert "By subject" in page


def test_batches_do_not_change_answers(questions: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = VisionLanguage.from_pretrained(checkpoint, device="cpu")
    words = {"gen_length": 4, "block_length": 4, "num_inference_steps": 2}
    runs = [mmmu.measure(model, questions, out=tmp_path / str(n), limit=1, batch=n, words=words) for n in (1, 3)]
    assert runs[0].raw == runs[1].raw


def test_parquet_gives_the_same_documents(questions: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    mmmu_format.build(tmp_path, per_subject=3, parquet=True)
    assert read_documents(tmp_path) == read_documents(questions)


def pro_folder(questions: Path, folder: Path, part: str) -> Path:
    """The same questions as MMMU-Pro keeps them."""
    place = folder / part
    place.mkdir(parents=True)
    lines = []
    for path in sorted(questions.glob("*/validation.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row.pop("question_type") != "multiple-choice":
                continue
            for name in [k for k in row if k.startswith("image_") and row[k]]:
                shutil.copy(path.parent / row[name], place / row[name])
            if part == "vision":
                row = {"id": row["id"], "image": row["image_1"], "options": row["options"], "answer": row["answer"]}
            lines.append(json.dumps(row | {"subject": path.parent.name}))
    (place / "test.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(("part", "style"), [("standard (10 options)", "pro-direct"), ("vision", "pro-cot")])
def test_mmmu_pro_is_asked_and_written_in_its_own_form(part: str, style: str, questions: Path, tmp_path: Path) -> None:
    folder = pro_folder(questions, tmp_path / "pro", part)
    done = mmmu.measure(Scripted({}), folder, out=tmp_path / "run", style=style, split="test", part=part, name="tiny")
    assert done.result.protocol == "mmmu-pro"
    setting = "vision" if part == "vision" else "standard"
    lines = (tmp_path / "run" / f"tiny_{setting}_{mmmu.STYLES[style].vision}.jsonl").read_text().splitlines()
    assert len(lines) == done.result.n
    assert {"response", "pred_indexs", "if_right", "options"} <= set(json.loads(lines[0]))


def test_vision_is_not_parsed_for_llada_v(questions: Path, tmp_path: Path) -> None:
    folder = pro_folder(questions, tmp_path / "pro", "vision")

    class Letters:
        def ask(self, pictures, prompts, **words):  # type: ignore[no-untyped-def]
            assert all(len(p) == 1 for p in pictures)
            return ["the answer is A" for _ in prompts]

    done = mmmu.measure(Letters(), folder, out=tmp_path / "run", style="llada-v", split="test", part="vision")
    assert (done.result.accuracy, done.result.fallbacks) == (0, 0)


def test_options_that_look_like_code_are_never_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    code = f"[__import__('pathlib').Path({str(sentinel)!r}).write_text('x')]"
    for text in (code, "['a', open('x')]", "{'a': 1}", "[1, 2]", "lambda: 0", "[" * 5000, "['a'"):
        with pytest.raises(ConfigError, match="validation_Art_1"):
            options_of(text, "validation_Art_1")
    assert not sentinel.exists()
    assert options_of("['$6', \"can't\"]", "x") == ("$6", "can't")
    assert answer_of("['24/7', '3.429']", "x") == ("24/7", "3.429")
    assert answer_of("[0, 1)", "x") == "[0, 1)"
    assert answer_of(code, "x") == code
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("answer"), "no answer"),
        (lambda row: row.update(options="[]"), "without options"),
        (lambda row: row.update(image_1="../../secret.png"), "not a file in that folder"),
        (lambda row: row.update(id="validation_Alchemy_1"), "Alchemy"),
        (lambda row: row.update(question="<image 7> what?"), "image_7"),
    ],
    ids=["no_answer", "no_options", "path", "subject", "no_picture"],
)
def test_broken_questions_are_refused_by_name(change, message: str, questions: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "set"
    shutil.copytree(questions / "Design", folder)
    path = folder / "validation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[0])
    path.write_text("\n".join(json.dumps(r) for r in rows))
    with pytest.raises(ConfigError, match=message):
        mmmu.measure(Scripted({}), folder, out=tmp_path / "run")


def test_a_damaged_picture_and_a_doubled_id_are_refused_by_name(questions: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(questions / "Design", folder)
    victim = sorted(folder.glob("*.png"))[0]
    victim.write_bytes(victim.read_bytes()[:50])
    with pytest.raises(ConfigError, match=r"validation_Design_\d: a picture cannot be decoded"):
        mmmu.measure(Scripted({}), folder, out=tmp_path / "run")
    path = folder / "validation.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0])
    with pytest.raises(ConfigError, match="occurs more than once"):
        read_documents(folder)


def test_answer_files_with_missing_doubled_or_unknown_ids_are_refused(tmp_path: Path) -> None:
    truth = {f"validation_Art_{i}": {"question_type": "multiple-choice", "ground_truth": "A"} for i in range(3)}
    (tmp_path / "a.json").write_text(json.dumps(truth))
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"validation_Art_0": "A"}))
    with pytest.raises(ConfigError, match="2 of 3 ids missing, first validation_Art_1"):
        mmmu.score_files(path, tmp_path / "a.json")
    assert mmmu.score_files(path, tmp_path / "a.json", incomplete=True).unanswered == 2
    path.write_text(json.dumps(dict.fromkeys([*truth, "validation_Art_9"], "A")))
    with pytest.raises(ConfigError, match="first validation_Art_9"):
        mmmu.score_files(path, tmp_path / "a.json")
    path.write_text('{"validation_Art_0": "A", "validation_Art_0": "B"}')
    with pytest.raises(ConfigError, match="validation_Art_0 occurs more than once"):
        read_predictions(path)
    path.write_text('{"x": {"question_type": "open"}}')
    with pytest.raises(ConfigError, match="ground_truth"):
        read_answers(path)


def test_module_and_python_interface_agree(questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mmmu.measure(Scripted(truths_of(questions)), questions, out=tmp_path / "run")
    assert mmmu.main([str(tmp_path / "run" / "subjects")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["accuracy"] == evaluate("mmmu", tmp_path / "run" / "subjects").accuracy
    assert mmmu.main([str(tmp_path / "nothing")]) == 2
    shown = CliRunner().invoke(app, ["eval", "mmmu", str(tmp_path / "run" / "subjects")])
    assert "| Overall " in shown.stdout


def test_subjects() -> None:
    assert len(ORDER) == len(SHORT_NAMES) == sum(map(len, DOMAINS.values())) == 30
    assert {s for subjects in DOMAINS.values() for s in subjects} == set(ORDER)
    assert subject_of("validation_Architecture_and_Engineering_14") == "Architecture_and_Engineering"
    assert subjects_of("math,Art_Theory") == ("Art_Theory", "Math")
    for wrong in ("validation_Math", "Math_1", "validation__1"):
        with pytest.raises(ConfigError, match=wrong):
            subject_of(wrong)
