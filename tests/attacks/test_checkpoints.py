"""Files that want to run code: none does. Each payload is first shown to work on a careless reader."""

from __future__ import annotations

import builtins
import collections
import io
import json
import logging
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmdiff.errors import CheckpointError, UnsafeFileError
from mmdiff.io.checkpoint import read_tensors
from mmdiff.io.convert import convert
from mmdiff.models.llada import LLaDA
from mmdiff.models.registry import load_model
from tests.helpers import published


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.parts


def touch(sentinel: Path) -> dict[str, Call]:
    code = f"open({str(sentinel)!r}, 'w').close()"
    return {
        "shell": Call(os.system, f"touch '{sentinel}'"),
        "process": Call(subprocess.call, ["touch", str(sentinel)]),
        "exec": Call(builtins.exec, code),
        "eval": Call(builtins.eval, f"[{code}]"),
        "folder": Call(os.mkdir, str(sentinel)),
    }


def zipped(path: Path, payload: Any) -> None:
    torch.save({"w": torch.zeros(2), "x": payload}, path)


def legacy(path: Path, payload: Any) -> None:
    torch.save({"w": torch.zeros(2), "x": payload}, path, _use_new_zipfile_serialization=False)


def raw(path: Path, payload: Any) -> None:
    path.write_bytes(pickle.dumps({"x": payload}, protocol=2))


def raw_new(path: Path, payload: Any) -> None:
    path.write_bytes(pickle.dumps({"x": payload}, protocol=5))


PAYLOADS = [
    ("model.pt", zipped, "shell"),
    ("model.pth", legacy, "process"),
    ("model.ckpt", raw, "exec"),
    ("optimizer.bin", zipped, "eval"),
    ("pytorch_model.bin", raw_new, "folder"),
    ("model.safetensors", raw, "shell"),
    ("model.safetensors", raw_new, "process"),
    ("model.safetensors", zipped, "exec"),
    ("adapter.safetensors", legacy, "eval"),
]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(("name", "write", "kind"), PAYLOADS)
def test_r10_a_malicious_pickle_is_refused_whatever_it_is_called(tmp_path, monkeypatch, name, write, kind, forced):
    sentinel = tmp_path / "sentinel"
    path = tmp_path / name
    write(path, touch(sentinel)[kind])
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "config.json").write_text(json.dumps(published.OLMO))
    for use in (read_tensors, lambda p: convert(p, tmp_path / "out"), lambda p: read_tensors(p, root="x"), load_model):
        with pytest.raises(UnsafeFileError, match=path.name):
            use(path)
    if path.suffix == ".safetensors":
        with pytest.raises(UnsafeFileError, match="is a pickle under the name of a safetensors file"):
            read_tensors(tmp_path)
    assert not sentinel.exists()
    # The payload is a real one: a careless reader runs it.
    careless = (
        pickle.loads if write in (raw, raw_new) else (lambda data: torch.load(io.BytesIO(data), weights_only=False))
    )
    careless(path.read_bytes())
    assert sentinel.exists()


def test_r10_the_refusal_names_what_the_file_asks_for_and_how_to_convert_it(tmp_path):
    zipped(tmp_path / "evil.pth", touch(tmp_path / "sentinel")["shell"])
    with pytest.raises(UnsafeFileError) as error:
        read_tensors(tmp_path / "evil.pth")
    text = str(error.value)
    assert f"{os.system.__module__}.system" in text
    assert "nothing of it was run" in text
    assert "offline" in text
    assert "evil.safetensors" in text
    assert error.value.exit_code == 4


@pytest.mark.parametrize("root", [None, "state_dict"])
def test_r10_the_command_that_a_refusal_shows_converts_a_harmless_file(tmp_path, root):
    """As Lightning's checkpoints are, whose tables of callbacks are keyed by classes."""
    weights = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(2)}
    tree = {"callbacks": {collections.deque: {}}, **({root: weights} if root else weights)}
    torch.save(tree, tmp_path / "last.ckpt")
    with pytest.raises(UnsafeFileError) as error:
        read_tensors(tmp_path / "last.ckpt", root=root)
    code = str(error.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = dict(read_tensors(tmp_path / "last.safetensors"))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[k], v) for k, v in weights.items())


@pytest.mark.parametrize(
    "value",
    [Path("/x"), collections.deque([1]), torch.nn.Linear(2, 2), random.Random(0).getstate, os.getcwd],
)
def test_r10_objects_beyond_tensors_and_namespace_are_refused_even_if_harmless(tmp_path, value):
    torch.save({"w": torch.zeros(2), "x": value}, tmp_path / "x.pth")
    with pytest.raises(UnsafeFileError, match="refused"):
        read_tensors(tmp_path / "x.pth")


def test_r10_a_pickled_shard_behind_an_honest_index_is_refused(tmp_path):
    sentinel = tmp_path / "sentinel"
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    zipped(tmp_path / "model-00002-of-00002.safetensors", touch(sentinel)["shell"])
    where = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(UnsafeFileError, match="model-00002-of-00002"):
        read_tensors(tmp_path)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1).expand(10**6, 10**6), torch.zeros(3, device="meta"), torch.zeros(4, 4).to_sparse()]
)
def test_a_tensor_that_claims_values_it_does_not_bring_is_refused(tmp_path, tensor):
    torch.save({"w": tensor}, tmp_path / "x.pth")
    with pytest.raises(UnsafeFileError, match="claims shape"):
        read_tensors(tmp_path / "x.pth")


def test_a_compressed_pytorch_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 50_000_000)
    assert (tmp_path / "x.pth").stat().st_size < 100_000
    with pytest.raises(UnsafeFileError, match="compressed"):
        read_tensors(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [zipped, legacy])
def test_damaged_pytorch_files_raise_one_kind_of_error(tmp_path, write):
    path = tmp_path / "x.pth"
    write(path, {"deep": [1, 2.0, "three"]})
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 3, 30))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged[: draw.choice((len(damaged), draw.randrange(len(damaged))))])
        try:
            dict(read_tensors(path))
        except CheckpointError:
            continue


HOSTILE = {
    "auto_map": {
        "AutoConfig": "evil.Config",
        "AutoModel": "evil.Model",
        "AutoModelForCausalLM": "other/repo--evil.Model",
    },
    "trust_remote_code": True,
    "_attn_implementation_internal": "other/repo",
    "_target_": "os.system",
    "nested": {"deeper": [{"auto_map": {"AutoModel": "evil.Model"}}]},
}


@pytest.mark.parametrize("layout", published.CONFIGS)
def test_r12_hostile_fields_of_a_config_do_nothing_but_one_notice(tmp_path, monkeypatch, caplog, layout):
    sentinel = tmp_path / "sentinel"
    src = tmp_path / "src"
    published.publish(src, layout, published.CONFIGS[layout] | HOSTILE)
    (src / "evil.py").write_text(f"open({str(sentinel)!r}, 'w').close()")
    (src / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tok", None]}}))
    monkeypatch.chdir(src)
    with caplog.at_level(logging.WARNING):
        load_model(src)
    assert len(caplog.records) == 1
    assert "_attn_implementation_internal, _target_, auto_map, trust_remote_code ignored" in caplog.text
    convert(src, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    load_model(tmp_path / "ours")
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    assert said == published.CONFIGS[layout] | {"nested": {"deeper": [{}]}}
    assert not sentinel.exists()
    assert "evil" not in sys.modules
    assert not list(tmp_path.glob("*/evil.py"))[1:]


def test_r12_hostile_fields_do_not_hide_in_our_own_layout(tmp_path, caplog):
    published.publish(tmp_path / "src", "olmo")
    convert(tmp_path / "src", tmp_path / "ours")
    (tmp_path / "ours" / "manifest.json").unlink()
    path = tmp_path / "ours" / "config.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"auto_map": {"AutoModel": "evil.Model"}}))
    LLaDA.from_pretrained(tmp_path / "ours")
    assert "auto_map ignored" in caplog.text
    tree["config"]["_target_"] = "os.system"
    path.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=r"unknown key '_target_'"):
        LLaDA.from_pretrained(tmp_path / "ours")


def test_r15_200_of_200_flipped_bits_in_a_checkpoint_are_found_at_load(tmp_path):
    published.publish(tmp_path / "src", "olmo")
    convert(tmp_path / "src", tmp_path / "ours", max_shard_bytes=8000)
    files = sorted(p for p in (tmp_path / "ours").iterdir() if p.name != "README.md")
    assert len(files) > 4
    draw = random.Random(0)
    for _ in range(200):
        path = draw.choice(files)
        whole = path.read_bytes()
        bit = draw.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            LLaDA.from_pretrained(tmp_path / "ours")
        path.write_bytes(whole)
    LLaDA.from_pretrained(tmp_path / "ours")
