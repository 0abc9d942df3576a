"""Index and writer: names with dots, strictness about tar files, deterministic bytes."""

from __future__ import annotations

import gc
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.index import SUFFIXES, build_index, index_name, parse_index, read_index, split_name
from data_pipelines.pack import write_shards
from data_pipelines.source import open_shards
from data_pipelines.tarscan import MAX_MEMBER_BYTES
from mmdiff.errors import ConfigError, ShardError
from tests.helpers.audit import watch

Make = Callable[..., list[Path]]


def tar(path: Path, *entries: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as out:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                out.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                out.addfile(info, io.BytesIO(entry[1]))
    return path


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [
        ("v1.5_img.png", "v1.5_img", "png"),
        ("a/b.c/d.JPG", "a/b.c/d", "jpg"),
        ("x.codes.npy", "x", "codes.npy"),
        ("x.npy", "x", "npy"),
        ("x.seg.png", "x.seg", "png"),
        ("x.tar.gz", "x.tar", ".gz"),
        ("README", "README", "."),
        (".png", ".png", "."),
    ],
)
def test_only_a_known_suffix_is_split_off(name: str, key: str, suffix: str) -> None:
    assert split_name(name) == (key, suffix)


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30), st.sampled_from(SUFFIXES)
)
def test_any_key_without_a_suffix_of_its_own_is_found_again(key: str, suffix: str) -> None:
    if split_name(key)[1].strip(".") not in SUFFIXES and not (key.lower().endswith(".codes") or key == "codes"):
        assert split_name(f"{key}.{suffix}") == (key, suffix)


def test_members_need_not_be_adjacent(tmp_path: Path) -> None:
    shard = tar(tmp_path / "a.tar", ("a.png", b"1"), ("b.png", b"22"), ("a.txt", b"333"), ("b.txt", b"4444"))
    index = build_index(shard)
    assert [(e.key, sorted(e.members)) for e in index] == [("a", ["png", "txt"]), ("b", ["png", "txt"])]
    entry = index[1].members["txt"]
    assert shard.read_bytes()[entry.offset : entry.offset + entry.size] == b"4444"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_is_read_like_the_standard_library_reads_it(tmp_path: Path, form: int) -> None:
    long = "folder/" * 20 + "é" * 20 if form != tarfile.USTAR_FORMAT else "folder/" * 20 + "x"
    shard = tar(tmp_path / "a.tar", ("d.e.txt", b"x" * 1000), (f"{long}.txt", b"y"), ("empty.txt", b""), form=form)
    with tarfile.open(shard) as opened:
        expected = {m.name: (m.offset_data, m.size) for m in opened}
    found = {f"{e.key}.txt": (e.members["txt"].offset, e.members["txt"].size) for e in build_index(shard)}
    assert found == expected


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [(f"k{i}", {"txt": b"t", "png": bytes(i)}) for i in range(7)]
    first = write_shards(rows, tmp_path / "a", "s", 3)
    second = write_shards(iter([(k, dict(reversed(m.items()))) for k, m in rows]), tmp_path / "b", "s", 3)
    assert [p.name for p in first] == ["s-00000.tar", "s-00001.tar", "s-00002.tar"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
        assert Path(index_name(a)).read_bytes() == Path(index_name(b)).read_bytes()


def test_writing_again_replaces_and_removes_what_is_left_over(make_shards: Make, tmp_path: Path) -> None:
    make_shards(50, 10)
    (tmp_path / "shards" / "other-00007.tar").write_bytes(b"kept")
    shards = make_shards(12, 10)
    names = {p.name for p in (tmp_path / "shards").iterdir()}
    assert names == {"other-00007.tar", *(p.name for p in shards), *(Path(index_name(p)).name for p in shards)}


@pytest.mark.filterwarnings("ignore")  # it leaves its files open
def test_webdataset_reads_what_is_written(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    (shard,) = write_shards([("a", {"txt": b"1"}), ("b", {"txt": b"2"})], tmp_path, "s")
    read = webdataset.WebDataset(str(shard), shardshuffle=False)
    assert [(s["__key__"], s["txt"]) for s in read] == [("a", b"1"), ("b", b"2")]
    del read
    gc.collect()


def test_a_saved_index_equals_a_new_one(make_shards: Make) -> None:
    for shard in make_shards(23, 10):
        saved, new = read_index(index_name(shard)), build_index(shard)
        assert list(saved) == list(new)
        assert saved.size == new.size == shard.stat().st_size
        assert [e.concept for e in saved][:2] == [f"c{int(saved.key(i)[-1]) % 5}" for i in range(2)]


def test_r28_a_missing_index_is_built_in_memory_and_nothing_is_written(
    make_shards: Make, caplog: pytest.LogCaptureFixture
) -> None:
    (shard,) = make_shards(3)
    saved = read_index(index_name(shard))
    Path(index_name(shard)).unlink()
    with watch() as seen:
        (built,) = open_shards(str(shard))
    assert list(built) == list(saved)
    assert seen.written == []
    assert f"{shard} has no index beside it" in caplog.text


def test_unknown_suffixes_are_counted_not_read(tmp_path: Path) -> None:
    shard = tar(tmp_path / "a.tar", ("a.png", b"1"), ("a.pkl", b"2"), ("b.pkl", b"3"), ("notes", b"4"))
    index = build_index(shard)
    assert (len(index), dict(index.ignored)) == (1, {".pkl": 2, ".": 1})


def special(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S"])
def test_anything_but_a_regular_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    shard = tar(tmp_path / "a.tar", ("b.png", b"1"), special(kind))
    with pytest.raises(ShardError, match=r"a\.tar: member 'a\.png' is a"):
        build_index(shard)


def test_folders_are_passed_over(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("sub")
    folder.type = tarfile.DIRTYPE
    assert len(build_index(tar(tmp_path / "a.tar", folder, ("sub/b.png", b"1")))) == 1


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": str(1 << 40)}
    with pytest.raises(ShardError, match="sparse"):
        build_index(tar(tmp_path / "a.tar", info))


def test_a_duplicate_member_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="two members for key 'a' and suffix 'png'"):
        build_index(tar(tmp_path / "a.tar", ("a.png", b"1"), ("a.PNG", b"2")))


@pytest.mark.parametrize("size", [MAX_MEMBER_BYTES + 1, 1 << 62])
def test_a_member_that_claims_to_be_huge_is_refused_unread(tmp_path: Path, size: int) -> None:
    info = tarfile.TarInfo("a.png")
    info.size = size
    header = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    with pytest.raises(ShardError, match=f"{size:,} bytes, limit"):
        build_index(tmp_path / "a.tar")


def test_a_negative_size_and_a_lying_pax_size_are_refused(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(ShardError, match="claims -1 bytes"):
        build_index(tmp_path / "a.tar")
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"size": "-5"}
    with pytest.raises(ShardError, match="PAX size"):
        build_index(tar(tmp_path / "b.tar", info))


@pytest.mark.parametrize("data", [b"", b"x", b"\x1f\x8b" + bytes(2000), b"not a tar " * 200])
def test_what_is_no_tar_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ShardError, match=r"a\.tar"):
        build_index(tmp_path / "a.tar")


def test_joined_archives_and_zeroed_headers_are_refused(make_shards: Make, tmp_path: Path) -> None:
    one, two = make_shards(20, 10)
    (tmp_path / "joined.tar").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(ShardError, match="after the end mark"):
        build_index(tmp_path / "joined.tar")


def test_an_empty_shard_is_an_index_without_samples(tmp_path: Path) -> None:
    assert len(build_index(tar(tmp_path / "a.tar"))) == 0


def change(tree: dict, key: str, value: object) -> bytes:
    return json.dumps({**tree, key: value}).encode()


def test_a_damaged_index_is_refused_and_says_what_to_do(make_shards: Make) -> None:
    (shard,) = make_shards(3)
    tree = json.loads(Path(index_name(shard)).read_text())
    bad = [b"", b"{", b"[]", b"null", b'{"format": "x"}', b"[" * 100_000]
    bad += [change(tree, k, v) for k, v in (("version", 9), ("size", 10), ("keys", ["a"]), ("offset", [1]))]
    bad += [change(tree, k, [v] * len(tree[k])) for k, v in (("offset", -1), ("length", 1 << 40), ("suffix", 99))]
    bad += [change(tree, k, [v] * len(tree[k])) for k, v in (("concept", 99), ("member_ends", 99), ("crc32", "x"))]
    bad += [change(tree, "length", [[1]]), change(tree, "keys", [1, 2, 3]), change(tree, "suffixes", 7)]
    for data in bad:
        with pytest.raises(ShardError, match="mmdiff data index"):
            parse_index(data, str(shard))


@settings(max_examples=60)
@given(st.data())
def test_a_flipped_byte_in_an_index_never_gives_members_outside_the_shard(data: st.DataObject) -> None:
    text = bytearray(INDEX)
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        index = parse_index(bytes(text), "x.tar")
    except ShardError:
        return
    for entry in index:
        assert all(m.offset >= 0 and m.offset + m.size <= index.size for m in entry.members.values())


INDEX = json.dumps(
    {"format": "mmdiff-shard-index", "version": 1, "size": 10240, "suffixes": ["png", "txt"], "concepts": ["c"]}
    | {"ignored": {}, "keys": ["a", "b"], "member_ends": [2, 4], "suffix": [0, 1, 0, 1], "concept": [0, -1]}
    | {"offset": [512, 1536, 2560, 3584], "length": [9, 8, 7, 6], "crc32": [1, 2, 3, 4]}
).encode()


@pytest.mark.parametrize(
    ("key", "members", "word"),
    [
        ("", {"png": b""}, "relative name"),
        ("/abs", {"png": b""}, "relative name"),
        ("a/../../b", {"png": b""}, "relative name"),
        ("a", {}, "no members"),
        ("a", {"pkl": b""}, "would not be read back"),
        ("a.codes", {"npy": b""}, "would not be read back"),
    ],
)
def test_samples_that_could_not_be_read_back_are_not_written(
    tmp_path: Path, key: str, members: dict[str, bytes], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        write_shards([(key, members)], tmp_path, "s")
    assert not list(tmp_path.glob("*.tar*"))


def test_duplicate_keys_no_samples_and_bad_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="occurs twice"):
        write_shards([("a", {"txt": b""}), ("a", {"png": b""})], tmp_path, "s")
    with pytest.raises(ConfigError, match="no samples"):
        write_shards([], tmp_path, "s")
    with pytest.raises(ConfigError, match="shard name"):
        write_shards([("a", {"txt": b""})], tmp_path, "../s")


def test_an_index_of_many_samples_is_small() -> None:
    n = 20_000
    keys = [f"{i:08d}" for i in range(n)]
    tree = json.loads(INDEX) | {
        "size": 1 << 40,
        "keys": keys,
        "concept": [-1] * n,
        "member_ends": list(range(2, 2 * n + 2, 2)),
    }
    tree |= {"suffix": [0, 1] * n, "offset": list(range(2 * n)), "length": [1] * 2 * n, "crc32": [7] * 2 * n}
    index = parse_index(json.dumps(tree).encode(), "x.tar")
    columns = (index.key_ends, index.member_ends, index.suffix, index.offset, index.length, index.crc32, index.concept)
    assert (len(index.keys) + sum(c.nbytes for c in columns)) / n <= 64
    assert index[n - 1].key == keys[-1]
    assert index[n - 1].members["txt"].offset == 2 * n - 1
