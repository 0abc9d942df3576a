"""GenEval from prompts to official files: real pictures, a tiny detector, a tiny model, interruptions, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_pipelines.datasets import geneval_format
from eval import geneval
from eval.geneval import files, prompts
from eval.geneval.by_scorer import LABEL, judge_by_scorer, plain
from eval.geneval.colors import ColorClassifier
from eval.geneval.detector import Detector
from eval.geneval.mask2former import fitted_size, network_input
from eval.geneval.rules import Detection
from mmdiff.cli import app
from mmdiff.commands.eval import evaluate
from mmdiff.errors import CheckpointError, ConfigError

TINY_CLIP = ColorClassifier(lambda texts: torch.ones(len(texts), 4), lambda image: torch.ones(1, 4), "constant")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    geneval_format.build(folder, prompts=10, samples=2, size=96)
    return folder


class Script:
    """A detector that finds what lies there by construction, and can be stopped."""

    name = "script"

    def __init__(self, folder: Path, stop_after: int | None = None) -> None:
        found = files.read_detections(folder / "detections.jsonl")
        self.by_bytes = {np.asarray(Image.open(folder / n)).tobytes(): d for n, d in found.items()}
        self.stop_after, self.calls = stop_after, 0

    def __call__(self, image: Image.Image) -> list[Detection]:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        return self.by_bytes[np.asarray(image.convert("RGB")).tobytes()]


def truth_of_colors(image, name, objects, options):  # type: ignore[no-untyped-def]
    return [d.color or "white" for d in objects]


truth_of_colors.name = "truth"  # type: ignore[attr-defined]


def test_true_detections_find_the_pictures_that_are_wrong_on_purpose(pictures: Path) -> None:
    result = geneval.score_files(pictures, detections=pictures / "detections.jsonl")
    assert 0.4 < result.correct_images < 1
    wrong = [p for p in result.pictures if not p.correct]
    assert all("found" in p.reason or "no target" in p.reason for p in wrong)
    assert {t.tag for t in result.tasks} == {"single_object", "two_object", "counting", "colors", "position"}


def test_a_run_writes_official_files_that_score_the_same(pictures: Path, tmp_path: Path) -> None:
    result = geneval.measure(pictures, out=tmp_path, detector=Script(pictures), colors=truth_of_colors)
    assert result.overall == geneval.score_files(pictures, detections=pictures / "detections.jsonl").overall
    again = geneval.score_files(tmp_path / "results.jsonl")
    assert (again.overall, again.tasks) == (result.overall, result.tasks)
    from_file = geneval.score_files(pictures, detections=tmp_path / "detections.jsonl")
    assert from_file.overall == result.overall
    first = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert set(first) == {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    assert json.loads(first["metadata"])["prompt"] == first["prompt"]
    assert "Overall score (avg. over tasks): " in (tmp_path / "summary.txt").read_text()


def test_an_interrupted_run_goes_on_and_gives_the_same(pictures: Path, tmp_path: Path) -> None:
    whole = geneval.measure(pictures, out=tmp_path / "a", detector=Script(pictures), colors=truth_of_colors)
    with pytest.raises(KeyboardInterrupt):
        geneval.measure(pictures, out=tmp_path / "b", detector=Script(pictures, 7), colors=truth_of_colors)
    second = Script(pictures)
    assert geneval.measure(pictures, out=tmp_path / "b", detector=second, colors=truth_of_colors) == whole
    assert second.calls == whole.images - 7
    assert (tmp_path / "b" / "results.jsonl").read_bytes() == (tmp_path / "a" / "results.jsonl").read_bytes()


def test_the_tiny_detector_and_clip_run_through_the_plumbing(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    geneval_format.build(folder, prompts=1, samples=1, size=32)
    detector = Detector.tiny()
    seen: list[list[Detection]] = []

    def watched(image: Image.Image) -> list[Detection]:
        seen.append(detector(image))
        return seen[-1]

    result = geneval.measure(folder, out=tmp_path / "run", detector=watched, colors=TINY_CLIP)
    assert result.images == len(seen) == 1
    assert seen[0]
    assert all(d.mask.shape == (32, 32) and d.box.shape == (4,) for d in seen[0])
    assert [d.score for d in seen[0]] == sorted((d.score for d in seen[0]), reverse=True)
    detector.net.save_pretrained(tmp_path / "detector")
    loaded, same = Detector.from_pretrained(tmp_path / "detector").net.state_dict(), Detector.tiny().net.state_dict()
    for key, tensor in detector.net.state_dict().items():
        assert torch.equal(loaded[key], tensor)
        assert torch.equal(same[key], tensor)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Detector.from_pretrained(tmp_path / "nothing-there")


def test_input_of_the_detector() -> None:
    assert fitted_size(64, 64) == (800, 800)
    assert fitted_size(100, 400) == (333, 1333)
    pixels, real, fitted = network_input(torch.full((3, 100, 400), 124, dtype=torch.uint8))
    assert fitted == (333, 1333)
    assert pixels.shape == (1, 3, 352, 1344)
    assert bool(real[0, :333, :1333].all())
    assert int(real.sum()) == 333 * 1333
    assert float(pixels[0, :, 340:].abs().max()) == 0


def test_a_tiny_model_draws_and_is_judged_through_the_command(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    every = [json.loads(p.read_text()) for p in sorted(pictures.glob("*/metadata.jsonl"))]
    file.write_text(prompts.metadata_lines(every))
    words = ["eval", "geneval", str(checkpoint), "--out", str(tmp_path / "run"), "--prompts", str(file), "--limit", "2"]
    words += ["--samples", "2", "--steps", "2", "--device", "cpu", "--compare", "published", "--detections"]
    made = tmp_path / "made.jsonl"
    names = [f"{p:05d}/samples/{s:05d}.png" for p in range(2) for s in range(2)]
    made.write_text("\n".join(json.dumps({"filename": n, "detections": []}) for n in names))
    printed = CliRunner().invoke(app, [*words, str(made)])
    assert printed.exit_code == 0, printed.output
    assert "Total images: 4" in printed.stdout
    assert "SDXL" in printed.stdout
    tree = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (tree["measure"], tree["result"]["overall"]) == ("geneval", 0)
    assert "<img" in (tmp_path / "run" / "report.html").read_text()
    drawn = {p: p.read_bytes() for p in (tmp_path / "run" / "images").glob("*/samples/*.png")}
    assert len(drawn) == 4
    victim = sorted(drawn)[1]
    victim.write_bytes(b"cut")
    assert CliRunner().invoke(app, [*words, str(made)]).exit_code == 0
    assert {p: p.read_bytes() for p in drawn} == drawn
    other = CliRunner().invoke(app, [*words, str(made), "--seed", "7"])
    assert other.exit_code == 2
    assert "other settings" in other.output


def test_verdicts_of_an_emoji_scorer_are_labelled(pictures: Path) -> None:
    class Scorer:
        """Knows every text and picture by a hash."""

        class config:  # noqa: N801
            image_size = 16

        def embed_text(self, ids, valid):  # type: ignore[no-untyped-def]
            return torch.nn.functional.one_hot(ids[:, 0], 64).float()

        def embed_image(self, pixels):  # type: ignore[no-untyped-def]
            return torch.ones(len(pixels), 64) * torch.arange(64)

    def encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(len(texts))[:, None], torch.ones(len(texts), 1, dtype=torch.bool)

    told = judge_by_scorer(pictures, Scorer(), encode)
    assert told.result.correct_images == told.shuffled == told.chance == pytest.approx(1 / told.result.prompts)
    assert LABEL.startswith("NOT GenEval")
    assert [plain(p) for p in ("a photo of an apple", "a photo of two cats", "red cup")] == [
        "apple",
        "two cats",
        "red cup",
    ]


def test_prompts_in_the_words_of_captions(tmp_path: Path) -> None:
    count = geneval_format.write_prompts(tmp_path / "prompts.jsonl")
    found = prompts.read_prompts(tmp_path / "prompts.jsonl")
    assert len(found) == count > 20
    assert all(metadata["prompt"] == metadata["include"][0]["class"] for metadata in found)


def test_tiny_needs_no_weights_and_missing_ones_are_named(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    def nowhere(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to download weights\nmore")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", nowhere)
    words = ["eval", "geneval", str(pictures), "--detector", "tiny"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    assert "NOT GenEval: random detector" in done.output
    refused = CliRunner().invoke(app, [*words, "--clip", "ViT-B-32/openai", "--out", str(tmp_path / "b")])
    assert refused.exit_code == 2
    assert "CLIP ViT-B-32/openai" in refused.output


def test_what_is_not_geneval_stands_beside_nothing(pictures: Path, tmp_path: Path) -> None:
    words = ["eval", "geneval", str(pictures), "--detector", "tiny", "--compare", "published", "--out", str(tmp_path)]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "not GenEval" in refused.output


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "00001" / "samples" / "00001.png").unlink(), r"00001: 1 pictures, 2 expected"),
        (lambda f: (f / "00002" / "metadata.jsonl").unlink(), r"00002.*metadata"),
        (lambda f: (f / "00002" / "metadata.jsonl").write_text('{"tag": "x", "prompt": "y"}'), "no include"),
        (lambda f: (f / "00000" / "samples" / "00000.png").write_bytes(b"junk"), r"00000\.png: cannot be decoded"),
        (lambda f: [shutil.rmtree(p) for p in f.glob("0*")], "no folders"),
    ],
    ids=["missing", "no_metadata", "metadata", "corrupt", "empty"],
)
def test_broken_folders_are_refused_by_name(damage, message: str, pictures: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "copy"
    shutil.copytree(pictures, folder)
    script = Script(folder)
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        geneval.measure(folder, out=tmp_path / "run", detector=script, colors=truth_of_colors)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"include": [{"class": "unicorn", "count": 1}]}, "unicorn"),
        ({"include": [{"class": "cat", "count": 1, "color": "mauve"}]}, "mauve"),
        ({"include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]}, "earlier object"),
        ({"include": [{"class": "cat"}]}, "no count"),
    ],
)
def test_prompts_that_cannot_be_judged_are_refused(metadata: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"tag": "x", "prompt": "y", **metadata}))
    with pytest.raises(ConfigError, match=message):
        prompts.read_prompts(path)


def test_detections_that_do_not_agree_are_refused(pictures: Path, tmp_path: Path) -> None:
    lines = (pictures / "detections.jsonl").read_text().splitlines()
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines[1:]))
    with pytest.raises(ConfigError, match=r"1 of 20 pictures missing, first 00000/samples/00000.png"):
        geneval.score_files(pictures, detections=path)
    path.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(ConfigError, match="occurs more than once"):
        geneval.score_files(pictures, detections=path)
    path.write_text(json.dumps({"filename": "x", "detections": [{"class": "cat", "box": [1, 2], "score": 1}]}))
    with pytest.raises(ConfigError, match="no detection of the 80"):
        files.read_detections(path)


def test_module_and_python_interface_agree(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert geneval.main([str(pictures), "--detections", str(pictures / "detections.jsonl")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["overall"] == evaluate("geneval", pictures, pictures / "detections.jsonl").overall
    assert geneval.main([str(pictures)]) == 2
    assert "mmdiff eval geneval" in capsys.readouterr().err


def test_prompts_of_the_published_set_have_the_published_hash() -> None:
    every = prompts.official_prompts()
    assert len(every) == 553
    assert every[0]["prompt"].startswith("a photo of ")
    assert len(prompts.CLASSES) == 80
