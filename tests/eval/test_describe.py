"""Captions, answers and likelihoods by a tiny model on real pictures, from shards and from COCO-style JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipelines.reader import iter_samples
from eval import nll
from eval.records import captioned, questions
from mmdiff.cli import app
from mmdiff.commands.eval import evaluate
from mmdiff.errors import ConfigError
from mmdiff.images import decode, encode_png
from mmdiff.pipelines import load

SHARDS = "embedded:emoji/novel_concepts"


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six emoji as COCO keeps pictures: annotations beside a folder of files."""
    folder = tmp_path_factory.mktemp("coco")
    images, annotations = [], []
    for number, (sample, _) in zip(range(6), iter_samples(SHARDS), strict=False):
        assert sample is not None
        name = f"picture_{number}.png"
        (folder / name).write_bytes(encode_png(decode(sample.image())))
        images.append({"id": number, "file_name": name})
        annotations += [{"image_id": number, "caption": c} for c in sample.info()["captions"]]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("measure", ["caption", "vqa"])
def test_a_model_is_asked_about_shards_resumably(measure: str, checkpoint: Path, tmp_path: Path) -> None:
    words = ["eval", measure, f"model:{checkpoint}", SHARDS, "--out", tmp_path / "run", "--limit", 6, "--device", "cpu"]
    first = run(*words)
    tree = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(tree["items"]) == tree["result"]["n"] == 6
    assert {"caption": "Worst", "vqa": "Wrong answers"}[measure] in (tmp_path / "run" / "report.html").read_text()
    answers = tmp_path / "run" / "answers-00000.jsonl"
    kept = answers.read_text().splitlines()[:2]
    answers.write_text("\n".join(kept) + '\n{"id": "cut')
    assert run(*words) == first
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == tree
    official = evaluate(measure, tmp_path / "run" / "predictions.json", truths(measure, tmp_path))
    assert official.n == 6


def truths(measure: str, folder: Path) -> Path:
    items = (captioned if measure == "caption" else questions)(SHARDS)[:6]
    path = folder / "truth.json"
    path.write_text(json.dumps([i.truth for i in items]))
    return path


def test_coco_files_and_their_pictures(coco: Path, checkpoint: Path, tmp_path: Path) -> None:
    words = ["eval", "caption", f"model:{checkpoint}", coco / "captions.json", "--images", coco]
    run(*words, "--out", tmp_path / "run", "--device", "cpu")
    rows = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert {r["image_id"] for r in rows} == {str(i) for i in range(6)}
    scored = json.loads(run("eval", "caption", tmp_path / "run" / "predictions.json", coco / "captions.json", "--json"))
    assert scored["n"] == 6
    assert scored["protocol"] == "coco"
    victim = coco / "picture_3.png"
    data = victim.read_bytes()
    victim.unlink()
    done = CliRunner().invoke(app, [str(w) for w in [*words, "--out", tmp_path / "other", "--device", "cpu"]])
    victim.write_bytes(data)
    assert done.exit_code == 2


def test_questions_of_a_file_need_texts_and_pictures(coco: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"annotations": [{"question_id": 5, "image_id": 1, "answer": "red"}]}))
    with pytest.raises(ConfigError, match="question 5 has no text"):
        questions(path, images=coco)
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"questions": [{"question_id": 5, "question": "Which?"}]}))
    (one,) = questions(path, images=coco, asked=asked)
    assert one.prompt == "Which?"
    with pytest.raises(ConfigError, match="picture 1 is not there"):
        one.image()


def test_a_models_answers_need_a_folder(checkpoint: Path) -> None:
    done = CliRunner().invoke(app, ["eval", "vqa", f"model:{checkpoint}", SHARDS])
    assert done.exit_code == 2
    assert "--out" in done.output


def test_likelihood_by_hand() -> None:
    result = nll.score([-math.log(8), -math.log(2)], ["abcd", "ab"], [3, 1])
    assert result.nll_per_token == pytest.approx(math.log(2))
    assert result.perplexity == pytest.approx(2)
    assert result.bits_per_byte == pytest.approx(4 / 6)
    with pytest.raises(ConfigError, match="text 1 'ab'"):
        nll.score([-1.0, float("nan")], ["abcd", "ab"], [3, 1])


def test_likelihood_of_a_model_is_the_pipelines(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "a", "answer": a}) for a in ("cat", "a red circle")))
    printed = json.loads(run("eval", "nll", checkpoint, path, "--samples", 4, "--device", "cpu", "--json"))
    text = load(checkpoint, device="cpu").text
    wanted = [-text.loglikelihood("a", a, samples=4) for a in ("cat", "a red circle")]
    assert printed["each"] == pytest.approx(wanted)
    shards = json.loads(
        run("eval", "nll", checkpoint, SHARDS, "--samples", 2, "--limit", 2, "--device", "cpu", "--json")
    )
    assert shards["n"] == 2
    words = ["eval", "nll", checkpoint, SHARDS, "--samples", 2, "--limit", 3, "--device", "cpu", "--out"]
    first = run(*words, tmp_path / "run")
    tree = json.loads((tmp_path / "run" / "result.json").read_text())
    answers = tmp_path / "run" / "answers-00000.jsonl"
    answers.write_text(answers.read_text().splitlines()[0] + '\n{"id": "1", "loglik')
    assert run(*words, tmp_path / "run") == first
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == tree
    assert "Least expected" in (tmp_path / "run" / "report.html").read_text()
    path.write_text(json.dumps({"prompt": "x"}))
    assert CliRunner().invoke(app, ["eval", "nll", str(checkpoint), str(path)]).exit_code == 2
