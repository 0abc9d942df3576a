from __future__ import annotations

import json
import math
import random

import pytest

from mmdiff.errors import CheckpointError
from mmdiff.io.atomic import MANIFEST, load_json, save_json, save_text, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.json").write_text('{"x": 1}')
    (tmp_path / "sub" / "b.bin").write_bytes(bytes(range(256)))
    (tmp_path / "README.md").write_text("card")
    write_manifest(tmp_path)
    return tmp_path


def test_a_whole_folder_verifies_and_its_card_may_be_edited(folder):
    (folder / "README.md").write_text("a better card")
    verify_manifest(folder)
    assert set(json.loads((folder / MANIFEST).read_text())["files"]) == {"a.json", "sub/b.bin"}


def test_r15_every_one_of_200_flipped_bits_is_found(folder):
    draw = random.Random(0)
    files = [folder / "a.json", folder / "sub" / "b.bin", folder / MANIFEST]
    for _ in range(200):
        path = draw.choice(files)
        before = path.read_bytes()
        bit = draw.randrange(8 * len(before))
        after = bytearray(before)
        after[bit // 8] ^= 1 << bit % 8
        path.write_bytes(after)
        with pytest.raises(CheckpointError):
            verify_manifest(folder)
        path.write_bytes(before)
    verify_manifest(folder)


def test_every_byte_of_a_manifest_counts(folder):
    path = folder / MANIFEST
    before = path.read_bytes()
    for byte in range(len(before)):
        after = bytearray(before)
        after[byte] ^= 1 << (5 * byte) % 8
        path.write_bytes(after)
        with pytest.raises(CheckpointError):
            verify_manifest(folder)


def test_missing_changed_and_shortened_files_are_all_named(folder):
    (folder / "a.json").unlink()
    (folder / "sub" / "b.bin").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"a\.json cannot be read.*sub/b\.bin has 5 bytes, its manifest says 256"):
        verify_manifest(folder)


def test_a_manifest_that_leads_out_of_the_folder_is_refused(folder):
    tree = {"algorithm": "sha256", "files": {"../secret": {"sha256": "0", "size": 1}}}
    (folder / MANIFEST).write_text(json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    with pytest.raises(CheckpointError, match="outside the folder"):
        verify_manifest(folder)


def test_json_survives_and_has_a_size_cap(tmp_path):
    tree = {"a": [1, 2.5, None, True, "ü"], "b": {}}
    save_json(tmp_path / "x.json", tree)
    assert load_json(tmp_path / "x.json") == tree
    with pytest.raises(CheckpointError, match="limit 10"):
        load_json(tmp_path / "x.json", limit=10)


@pytest.mark.parametrize("tree", [math.nan, math.inf, {1, 2}, object()])
def test_what_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path, tree):
    with pytest.raises(CheckpointError, match="not plain data"):
        save_json(tmp_path / "x.json", {"v": tree})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_is_a_sentence(tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.json: not JSON"):
        load_json(tmp_path / "x.json")


def test_names_of_255_bytes_and_of_other_alphabets_work(tmp_path):
    for name in ("a" * 255, "日本 語.txt"):
        save_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"
    assert len(list(tmp_path.iterdir())) == 2
