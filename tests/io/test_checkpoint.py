from __future__ import annotations

import argparse
import errno
import json
import os
import resource
import weakref

import pytest
import torch
from torch import Tensor, nn

from mmdiff.errors import CheckpointError, UnsafeFileError
from mmdiff.io import checkpoint
from mmdiff.io.tensors import TensorInfo, Tensors


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TENSORS = {
    "a.weight": draw(3, 4),
    "a.bias": draw(4, 3).T.bfloat16(),
    "count": torch.arange(5),
    "flags": torch.tensor([True, False]),
    "empty": torch.zeros(0, 2),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name])


def test_what_is_written_is_read_with_names_shapes_and_dtypes_known_before_reading(tmp_path):
    checkpoint.write_tensors(tmp_path / "x.safetensors", TENSORS)
    found = checkpoint.read_tensors(tmp_path / "x.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in found.info.items()} == {
        k: (tuple(v.shape), v.dtype) for k, v in TENSORS.items()
    }
    assert_same(dict(found), TENSORS)
    assert found.nbytes == sum(t.nbytes for t in TENSORS.values())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_names_that_share_memory_are_written_as_often(tmp_path):
    whole = draw(4, 4)
    shared = {"one": whole, "two": whole, "half": whole[:2], "column": whole[:, 1]}
    checkpoint.write_tensors(tmp_path / "x.safetensors", shared)
    assert_same(dict(checkpoint.read_tensors(tmp_path / "x.safetensors")), shared)


def test_shards_are_read_as_one_and_replace_a_former_model(tmp_path):
    checkpoint.write_sharded(tmp_path, {"old": draw(2)})
    files = checkpoint.write_sharded(tmp_path, TENSORS, max_shard_bytes=40)
    assert len(files) > 3
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in files)
    assert_same(dict(checkpoint.read_tensors(tmp_path)), TENSORS)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    checkpoint.write_sharded(tmp_path, TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_writing_shards_holds_one_shard_in_memory(tmp_path):
    size, count, per_shard = 4000, 12, 3
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def fetch(name: str) -> Tensor:
        nonlocal most
        tensor = torch.full((size // 4,), float(name))
        alive.append(weakref.ref(tensor))
        most = max(most, sum(r() is not None for r in alive))
        return tensor

    info = TensorInfo(shape=(size // 4,), dtype=torch.float32, file=tmp_path)
    lazy = Tensors({str(i): info for i in range(count)}, fetch)
    files = checkpoint.write_sharded(tmp_path, lazy, max_shard_bytes=per_shard * size)
    assert len(files) == count // per_shard + 1
    # One more than a shard, because the first of the next is read before the variable of the last is gone.
    assert per_shard <= most <= per_shard + 1


def test_a_missing_shard_is_named(tmp_path):
    files = checkpoint.write_sharded(tmp_path, TENSORS, max_shard_bytes=40)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=rf"shard {files[1].name} with \d+ tensors is missing"):
        checkpoint.read_tensors(tmp_path)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    checkpoint.write_sharded(tmp_path, TENSORS, max_shard_bytes=40)
    path = tmp_path / "model.safetensors.index.json"
    tree = json.loads(path.read_text())
    files = list(tree["weight_map"].values())
    lost = next(k for k, file in tree["weight_map"].items() if files.count(file) > 1)
    del tree["weight_map"][lost]
    path.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=f"disagree\n.*{lost}"):
        checkpoint.read_tensors(tmp_path)
    tree["weight_map"][lost] = "../model.safetensors"
    path.write_text(json.dumps(tree))
    with pytest.raises(UnsafeFileError, match="outside the folder"):
        checkpoint.read_tensors(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x10\0\0\0\0\0\0\0{}", b"\xff" * 8 + b"{" * 50, b"hello" * 20])
def test_a_damaged_safetensors_file_is_refused_by_name(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        checkpoint.read_tensors(tmp_path)


def test_a_truncated_safetensors_file_is_refused_before_a_tensor_is_asked_for(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        checkpoint.read_tensors(path)


def test_a_folder_without_weights_says_what_it_has(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors.*pytorch_model\.bin"):
        checkpoint.read_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.read_tensors(tmp_path / "absent")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pytorch_file_with_arguments_beside_the_weights_is_read_from_its_named_part(tmp_path, zipped):
    path = tmp_path / "x.pth"
    plain = {k: v for k, v in TENSORS.items() if v.numel()}
    tree = {"model": plain, "ema": {"deep": plain}, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    assert_same(dict(checkpoint.read_tensors(path, root="model")), plain)
    assert_same(dict(checkpoint.read_tensors(path, root="ema.deep")), plain)
    with pytest.raises(CheckpointError, match="say which part with root: 'model'"):
        checkpoint.read_tensors(path)
    with pytest.raises(CheckpointError, match="has no 'model_ema'"):
        checkpoint.read_tensors(path, root="model_ema")
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors"):
        checkpoint.read_tensors(path, root="epoch")


def test_a_flat_pytorch_file_needs_no_root(tmp_path):
    torch.save({"w": nn.Parameter(draw(2, 2))}, tmp_path / "x.ckpt")
    found = checkpoint.read_tensors(tmp_path / "x.ckpt")
    assert_same(dict(found), {"w": draw(2, 2)})
    assert not found["w"].requires_grad


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.long))


STATE = {"linear.weight": draw(2, 3), "linear.bias": draw(2), "frozen": draw(2), "steps": torch.tensor([1, 2])}


def meta() -> Net:
    with torch.device("meta"):
        return Net()


def test_a_module_is_filled_under_other_names_without_copying_into_it():
    given = {f"model.{k}": v for k, v in STATE.items()} | {"model.rotary.7": draw(1)}
    net = checkpoint.load_state(
        meta(), given, rename=lambda k: k.removeprefix("model."), unused=[r"model\.rotary\.\d+"]
    )
    assert_same(net.state_dict(), STATE)
    assert net.linear.weight.requires_grad
    assert not net.frozen.requires_grad
    assert net.linear.weight.data_ptr() != given["model.linear.weight"].data_ptr()


def test_a_dtype_applies_to_floating_tensors_only():
    net = checkpoint.load_state(meta(), STATE, dtype=torch.bfloat16)
    assert net.linear.weight.dtype == torch.bfloat16
    assert net.steps.dtype == torch.int64


def test_the_weights_survive_their_file(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.write_tensors(path, STATE)
    net = checkpoint.load_state(meta(), checkpoint.read_tensors(path))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\0" * size)
    assert_same(net.state_dict(), STATE)


def test_all_that_does_not_fit_is_listed_at_once_and_the_module_is_left_alone():
    given = {
        "linear.weight": draw(3, 2),
        "linear.bias": draw(2),
        "steps": STATE["steps"],
        **{f"more.{i}": draw(1) for i in range(30)},
    }
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_state(net, given, where="file.safetensors")
    text = str(error.value)
    assert "file.safetensors: does not fit Net" in text
    assert "1 missing: frozen" in text
    assert "30 unexpected" in text
    assert "more.19" in text
    assert "more.20" not in text
    assert "and 10 more" in text
    assert "linear.weight is [3, 2], the configuration asks for [2, 3]" in text
    assert_same(net.state_dict(), before)


def test_two_tensors_for_one_place_are_refused():
    given = {**STATE, "model.frozen": draw(2)}
    with pytest.raises(CheckpointError, match=r"model\.frozen \(the place of frozen\)"):
        checkpoint.load_state(meta(), given, rename=lambda k: k.removeprefix("model."))


@pytest.mark.parametrize("limit", [0, 7, 100, 5000, 11_000])
def test_r13_a_full_disk_while_saving_names_the_bytes_needed_and_keeps_the_former_file(tmp_path, limit):
    path = tmp_path / "x.safetensors"
    checkpoint.write_tensors(path, TENSORS)
    before = path.read_bytes()
    big = {"w": draw(3000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError) as error:
            checkpoint.write_tensors(path, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(error.value)
    assert "it needs 12,000 bytes" in str(error.value)
    assert "what was there before is intact" in str(error.value)
    assert "make room" in str(error.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_r13_a_failing_fsync_or_rename_keeps_the_former_file(tmp_path, monkeypatch, call):
    path = tmp_path / "x.safetensors"
    checkpoint.write_tensors(path, TENSORS)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.write_tensors(path, {"w": draw(3)})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent/x\.safetensors: could not be written"):
        checkpoint.write_tensors(tmp_path / "absent" / "x.safetensors", TENSORS)
