from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mmdiff import rng
from mmdiff.cli import app
from mmdiff.config import parse
from mmdiff.models import registry
from mmdiff.text import Tokenizer
from tests.helpers import published


def run(*words: object):
    return CliRunner().invoke(app, [str(w) for w in words])


@pytest.fixture
def unified(tmp_path):
    tokenizer = Tokenizer.train(["a cat", "a dog"], 300)
    language = {
        "vocab_size": 300,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "kv_heads": 2,
        "ffn_width": 24,
        **{name: getattr(tokenizer, name) for name in ("mask_id", "bos_id", "eos_id", "eot_id")},
    }
    vision = {"image_size": 16, "patch_size": 8, "width": 12, "depth": 1, "heads": 2, "ffn_width": 20}
    tree = {"type": "unified", "language": language, "vision": vision, "codes": {"codebook": 12, "grid": 4}}
    vq = parse(registry.FAMILIES["vq"].config, {"image_size": 16, "widths": [8, 16], "levels": [3, 4]}, "x")
    model = registry.build(parse(registry.FAMILIES["unified"].config, tree, "x"), generator=rng.generator(0, "init"))
    images = registry.build(vq, generator=rng.generator(1, "init"))
    model.save_pretrained(
        tmp_path / "unified", tokenizer=tokenizer, image_tokenizer=images, classes=["cat"], license="apache-2.0"
    )
    return tmp_path / "unified", sum(p.numel() for p in model.parameters())


def test_info_tells_what_a_checkpoint_is(unified):
    path, count = unified
    done = run("info", path, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["family"] == "unified"
    assert report["layout"] == "mmdiff"
    assert report["parameters"] == count
    assert report["dtypes"] == {"float32": count}
    assert report["bytes"] == 4 * count
    assert report["licence"] == "apache-2.0"
    assert set(report["capabilities"]) >= {"caption", "ask", "text_image", "class_image", "generate_text"}
    assert report["image_tokenizer"]["family"] == "vq"
    assert report["tokenizer"]["vocab_size"] <= 300
    assert report["config"]["codes"] == {"codebook": 12, "grid": 4, "rotary": "sequence", "levels": []}
    text = run("info", path).stdout
    for word in ("unified", f"{count:,} parameters", "float32", "apache-2.0", "text_image", "vq", "codes.grid 4"):
        assert word in text


def test_info_of_bare_weights_and_of_published_folders(tmp_path):
    torch.save({"w": torch.zeros(3, dtype=torch.bfloat16), "n": torch.zeros(2, dtype=torch.long)}, tmp_path / "x.pth")
    report = json.loads(run("info", tmp_path / "x.pth", "--json").stdout)
    assert (report["tensors"], report["parameters"], report["dtypes"]) == (2, 5, {"bfloat16": 3, "int64": 2})
    assert "family is not known" in run("info", tmp_path / "x.pth").stdout
    published.publish(tmp_path / "v", "llada-v")
    report = json.loads(run("info", tmp_path / "v", "--json").stdout)
    assert (report["family"], report["layout"], report["licence"]) == ("llada_v", "llada-v", None)
    assert len(report["dtypes"]) == 3


def test_a_training_checkpoint_in_a_pytorch_file_is_read_by_its_average_everywhere(tmp_path):
    weights = published.weights("llama", published.LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(published.LLAMA))
    raw = {k: torch.zeros_like(v) for k, v in weights.items()}
    torch.save({"model": raw, "model_ema": weights, "epoch": 3}, tmp_path / "x.pth")
    report = json.loads(run("info", tmp_path / "x.pth", "--json").stdout)
    assert (report["family"], report["tensors"], report["unused"]) == ("llada", len(weights), 0)
    done = run("convert", tmp_path / "x.pth", tmp_path / "folder")
    assert done.exit_code == 0, done.output
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(v, weights[k]) for k, v in tensors.items())


def test_info_of_a_tower_tells_what_is_left_out(tmp_path):
    tensors = published.publish(tmp_path, "siglip")
    count = sum(t.numel() for t in tensors.values())
    extra = {"vision_model.head.probe": torch.zeros(1, 1, 12), "logit_scale": torch.zeros(1)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    report = json.loads(run("info", tmp_path, "--json").stdout)
    assert (report["family"], report["parameters"], report["unused"]) == ("siglip", count, 2)
    assert "2 more tensors of the published layout are not used" in run("info", tmp_path).stdout


def test_convert_there_and_back_from_the_command_line(tmp_path):
    tensors = published.publish(tmp_path / "src", "olmo")
    done = run("convert", tmp_path / "src", tmp_path / "ours", "--json")
    assert json.loads(done.stdout)["tensors"] == len(tensors)
    done = run("convert", tmp_path / "ours", tmp_path / "llama", "--to", "llama")
    assert done.stdout.startswith(f"mmdiff -> llama: {len(tensors)} tensors")
    again = run("convert", tmp_path / "ours", tmp_path / "llama")
    assert again.exit_code == 2
    assert "not an empty folder" in again.stderr


def test_a_refused_checkpoint_exits_with_4_and_one_sentence(tmp_path):
    for words in (("info", tmp_path), ("info", tmp_path / "absent"), ("convert", tmp_path, tmp_path / "x")):
        done = run(*words)
        assert done.exit_code == 4
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


def test_help_of_both_commands_needs_no_torch():
    code = "import sys; import mmdiff.commands.convert, mmdiff.commands.info; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
