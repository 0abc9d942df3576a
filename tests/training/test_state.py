from __future__ import annotations

import errno
import json
import os
import random

import pytest
import torch
from torch import nn

from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.training import state
from mmdiff.training.loop import TrainConfig
from mmdiff.training.state import Checkpoints, Snapshot


def snapshot(samples: int) -> Snapshot:
    value = torch.arange(60.0).reshape(20, 3) + samples
    tensors = {"model": {"w": value}, "ema": {"w": value / 2}, "optimizer": {"step/w": torch.tensor(float(samples))}}
    return Snapshot(samples=samples, tensors=tensors, state={"loader": {"position": samples}})


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    (tmp_path / "checkpoints").mkdir()
    return Checkpoints(tmp_path, keep=2)


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(p.name for p in checkpoints.folder.iterdir())


def test_a_checkpoint_gives_back_what_was_saved(checkpoints):
    checkpoints.save(snapshot(40))
    loaded = checkpoints.load(checkpoints.latest())
    assert loaded.samples == 40
    assert loaded.state["loader"] == {"position": 40}
    for stem, tensors in snapshot(40).tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(loaded.tensors[stem][name], tensor)


def test_the_newest_two_are_kept(checkpoints):
    for samples in (5, 10, 9_999_999_999, 10_000_000_000):
        checkpoints.save(snapshot(samples))
    assert names(checkpoints) == ["step_10000000000", "step_9999999999"]
    assert checkpoints.latest().name == "step_10000000000"


def test_r15_every_flipped_bit_is_found(checkpoints):
    path = checkpoints.save(snapshot(40))
    files = sorted(p for p in path.iterdir())
    assert len(files) == 5
    draw, found = random.Random(0), 0
    for _ in range(200):
        file = draw.choice(files)
        whole = file.read_bytes()
        place = draw.randrange(len(whole) * 8)
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match="no checkpoint is whole"):
            checkpoints.latest()
        found += 1
        file.write_bytes(whole)
    assert found == 200
    assert checkpoints.latest() == path


def test_a_damaged_newest_one_is_set_aside_and_never_counts_as_kept(checkpoints, caplog):
    for samples in (10, 20, 30):
        checkpoints.save(snapshot(samples))
    damaged = checkpoints.folder / "step_0000000030" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    path = checkpoints.latest()
    assert path.name == "step_0000000020"
    assert "step_0000000030" in caplog.text
    checkpoints.set_aside_newer(path)
    assert checkpoints.load(path).samples == 20
    checkpoints.save(snapshot(25))
    assert names(checkpoints) == ["step_0000000020", "step_0000000025", "step_0000000030.damaged"]


def test_leftovers_are_removed_and_whole_ones_stay(checkpoints):
    kept = checkpoints.save(snapshot(10))
    for name in ("step_0000000020.tmp-77", "step_0000000005"):
        (checkpoints.folder / name).mkdir()
        (checkpoints.folder / name / "model.safetensors").write_bytes(b"half")
    checkpoints.clean()
    assert names(checkpoints) == [kept.name]


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_r13_a_failing_system_call_leaves_the_former_checkpoint(checkpoints, monkeypatch, call, code):
    former = checkpoints.save(snapshot(10))

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(snapshot(20))
    message = str(caught.value)
    assert str(checkpoints.folder / "step_0000000020") in message
    assert os.strerror(code) in message
    assert f"needs {snapshot(20).nbytes:,} bytes" in message
    assert "step_0000000010 is intact" in message
    assert ("make room" in message) == (code == errno.ENOSPC)
    assert checkpoints.latest() == former
    assert names(checkpoints) == [former.name]
    checkpoints.save(snapshot(20))
    assert checkpoints.latest().name == "step_0000000020"


def test_r14_a_vanished_folder_is_named(checkpoints):
    checkpoints.folder.rmdir()
    with pytest.raises(CheckpointError, match="see that the folder is there") as caught:
        checkpoints.save(snapshot(20))
    assert str(checkpoints.folder) in str(caught.value)
    assert "there is no earlier one" in str(caught.value)


def test_deletion_takes_the_manifest_first_and_its_failure_costs_nothing(checkpoints, monkeypatch, caplog):
    for samples in (10, 20):
        checkpoints.save(snapshot(samples))
    real = state.shutil.rmtree

    def stuck(path, **options):
        if path.name == "step_0000000010":
            raise OSError(errno.EBUSY, "busy")
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(state.shutil, "rmtree", stuck)
        assert checkpoints.save(snapshot(30)).name == "step_0000000030"
    assert "step_0000000010 could not be deleted (busy)" in caplog.text
    left = checkpoints.folder / "step_0000000010"
    assert (left / "model.safetensors").exists()
    assert not (left / "manifest.json").exists()
    checkpoints.clean()
    assert names(checkpoints) == ["step_0000000020", "step_0000000030"]


def test_r14_places_that_cannot_be_a_run_folder_are_refused_in_words(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    for place in (file, file / "below", dangling):
        with pytest.raises(ConfigError, match="cannot be the folder of a run"):
            state.claim(place, TrainConfig(samples=1), resume=False)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        state.claim(tmp_path / "new", TrainConfig(samples=1), resume=False)


def test_r14_a_symlink_to_a_folder_is_a_run_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    state.claim(tmp_path / "link", TrainConfig(samples=1), resume=False)
    assert (tmp_path / "real" / "config.yaml").is_file()


def test_a_folder_that_is_not_empty_needs_resume(tmp_path):
    state.claim(tmp_path, TrainConfig(samples=1), resume=False)
    with pytest.raises(ConfigError, match=r"not empty \(config.yaml\); add --resume"):
        state.claim(tmp_path, TrainConfig(samples=1), resume=False)


def test_a_folder_of_something_else_is_not_resumed(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"holds thesis.tex but no config.yaml"):
        state.claim(tmp_path, TrainConfig(samples=1), resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_refuses_a_changed_configuration_by_key_and_value(tmp_path):
    state.claim(tmp_path, TrainConfig(samples=100, optim={"lr": 0.1}), resume=False)
    with pytest.raises(ConfigError) as caught:
        state.claim(tmp_path, TrainConfig(samples=200, optim={"lr": 0.2}), resume=True)
    assert "samples: 100 -> 200" in str(caught.value)
    assert "optim.lr: 0.1 -> 0.2" in str(caught.value)
    assert "betas" not in str(caught.value)


def test_resume_allows_what_does_not_touch_the_numbers(tmp_path):
    state.claim(tmp_path, TrainConfig(samples=100), resume=False)
    state.claim(
        tmp_path, TrainConfig(samples=100, keep=5, log_every_samples=7, checkpoint_every_samples=9), resume=True
    )
    assert "keep: 5" in (tmp_path / "config.yaml").read_text()


def test_tied_weights_are_saved_once_and_buffers_too(toy):
    saved = state.model_tensors(toy.Net())
    assert "embed.weight" in saved
    assert "out.weight" not in saved
    assert "norm.running_mean" in saved


def test_copying_lists_everything_that_does_not_fit():
    own = nn.Linear(2, 3)
    saved = {"weight": torch.zeros(3, 3), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        state.copy_into(state.model_tensors(own), saved, "here")
    assert str(caught.value).startswith("here does not fit")
    for part in ("missing bias", "unexpected extra", "weight is torch.float32 (3, 3), expected torch.float32 (3, 2)"):
        assert part in str(caught.value)


def test_state_holds_json_only(checkpoints):
    path = checkpoints.save(snapshot(40))
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    json.loads((path / "state.json").read_text())
