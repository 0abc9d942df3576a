"""``mmdiff eval`` and `evaluate`: same numbers from the command line and from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from eval.fid import FidResult
from mmdiff.commands.eval import app, evaluate
from mmdiff.errors import ConfigError


def write(tmp_path: Path) -> tuple[Path, Path]:
    predictions, references = tmp_path / "p.json", tmp_path / "r.json"
    predictions.write_text(json.dumps([{"question_id": 1, "answer": "cat"}, {"question_id": 2, "answer": "dog"}]))
    references.write_text(
        json.dumps(
            [{"question_id": 1, "answer": "cat", "kind": "what"}, {"question_id": 2, "answer": "cat", "kind": "what"}]
        )
    )
    return predictions, references


def test_vqa_prints_a_table_json_and_a_file(tmp_path: Path) -> None:
    predictions, references = write(tmp_path)
    table = CliRunner().invoke(app, ["vqa", str(predictions), str(references)])
    assert table.exit_code == 0
    assert "what" in table.stdout
    assert "50.0%" in table.stdout
    out = tmp_path / "deep" / "result.json"
    printed = CliRunner().invoke(app, ["vqa", str(predictions), str(references), "--json", "--out", str(out)])
    assert json.loads(printed.stdout) == json.loads(out.read_text())
    assert json.loads(printed.stdout)["accuracy"] == evaluate("vqa", predictions, references).accuracy == 0.5


def test_caption_takes_files_and_plain_data(tmp_path: Path) -> None:
    predictions, references = tmp_path / "p.json", tmp_path / "r.json"
    predictions.write_text(json.dumps([{"image_id": "a", "caption": "man: dark skin tone"}]))
    references.write_text(json.dumps([{"image_id": "a", "caption": "woman: dark skin tone"}]))
    printed = CliRunner().invoke(app, ["caption", str(predictions), str(references)])
    assert printed.exit_code == 0
    assert ["tone", "100.0%"] in [line.split()[:2] for line in printed.stdout.splitlines()]
    from_files = evaluate("caption", predictions, references)
    assert evaluate("caption", {"a": "man: dark skin tone"}, {"a": ["woman: dark skin tone"]}) == from_files


def test_fid_takes_arrays_and_prints_the_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from eval import features

    def colour(path: str, device: torch.device) -> features.FeatureNetwork:
        def encode(images: torch.Tensor) -> torch.Tensor:
            return images.float().mean(dim=(2, 3))

        return features.FeatureNetwork(name="colour", sha256="", dim=3, encode=encode)

    monkeypatch.setitem(features.NETWORKS, "colour", colour)
    rows = torch.randint(0, 256, (40, 4, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name, part in (("a", rows[:10]), ("b", rows[10:])):
        (tmp_path / name).mkdir()
        for i, row in enumerate(part):
            Image.fromarray(row.numpy()).save(tmp_path / name / f"{i:05d}.png")
    wanted = evaluate("fid", rows[:10], rows[10:], features="colour", floor=True)
    assert isinstance(wanted, FidResult)
    arguments = ["fid", str(tmp_path / "a"), str(tmp_path / "b"), "--features", "colour", "--floor"]
    printed = CliRunner().invoke(app, arguments)
    words = [line.split() for line in printed.stdout.splitlines()]
    assert ["fid10", f"{wanted.fid:.2f}"] in [w[:2] for w in words]
    assert f"floor {wanted.floor:.2f} (real against real, 10 images each)".split() in words


def test_unknown_measures_are_refused() -> None:
    with pytest.raises(ConfigError, match="fid, vqa, caption"):
        evaluate("bleu", 1, 2)
    with pytest.raises(ConfigError, match="compares two things"):
        evaluate("vqa", 1)


def test_help_loads_nothing_heavy(repository: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from mmdiff.commands.eval import app;"
        "assert CliRunner().invoke(app, ['fid', '--help']).exit_code == 0;"
        "sys.exit(' '.join({'torch', 'numpy', 'timm'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
