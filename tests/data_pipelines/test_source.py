"""Finding shards: names, patterns, refused addresses, remote reads with faults."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipelines import ranges as ranges_module
from data_pipelines.index import build_index, index_name
from data_pipelines.ranges import RangeReader
from data_pipelines.reader import ShardReader
from data_pipelines.source import expand, open_shards
from mmdiff.errors import SampleError, ShardError
from tests.helpers.audit import watch
from tests.helpers.range_server import Server

Make = Callable[..., list[Path]]


def test_files_folders_globs_and_braces_name_the_same_shards(make_shards: Make, tmp_path: Path) -> None:
    shards = [str(p) for p in make_shards(30, 10)]
    folder = tmp_path / "shards"
    assert expand(folder) == shards
    assert expand(str(folder / "s-*.tar")) == shards
    assert expand(str(folder / "s-{00000..00002}.tar")) == shards
    assert expand(str(folder / "s-0000{0,1,2}.tar")) == shards
    assert expand(f"file://{folder}/s-00001.tar") == shards[1:2]
    assert [i.url for i in open_shards([folder, shards[0]])] == shards


def test_a_shard_that_is_missing_from_its_folder_is_an_error_and_one_line_tells_of_all_without_index(
    make_shards: Make, caplog: pytest.LogCaptureFixture
) -> None:
    shards = make_shards(60, 20)
    folder = shards[0].parent
    for shard in shards[:2]:
        Path(index_name(shard)).unlink()
    assert len(open_shards(folder)) == 3
    assert len(caplog.records) == 1
    shards[2].unlink()
    with pytest.raises(ShardError, match=r"s-00002\.tar: is missing, though its index is there \(1 such"):
        open_shards(folder)
    Path(index_name(shards[2])).unlink()
    assert len(open_shards(folder)) == 2


def test_a_name_with_braces_or_a_colon_that_exists_is_itself(tmp_path: Path, make_shards: Make) -> None:
    (shard,) = make_shards(2)
    for name in ("a{1..3}.tar", "run:1.tar"):
        copy = tmp_path / name
        copy.write_bytes(shard.read_bytes())
        assert expand(copy) == [str(copy)]


def test_braces_over_remote_names_are_expanded_without_touching_the_network() -> None:
    urls = expand("https://example.org/{train,test}-{08..11}.tar")
    assert len(urls) == 8
    assert urls[0] == "https://example.org/train-08.tar"
    assert urls[-1] == "https://example.org/test-11.tar"


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("pipe:cat x.tar", "shell command"),
        ("PIPE:curl https://x/y.tar", "shell command"),
        ("ftp://host/a.tar", "not a known kind"),
        ("https://example.org/*.tar", "cannot list"),
        ("nothing/here.tar", "no such shard"),
        ("nothing/*.tar", "no file matches"),
        ("embedded:../../etc", "expected embedded"),
        ("embedded:", "expected embedded"),
        ("embedded:nonexistent/train", "no such folder"),
        ("a{9..1}.tar", "backwards"),
        ("a{0..999999999}.tar", "more than 1,000,000"),
        ("a{0..9999}{0..9999}.tar", "more than 1,000,000"),
        ("$(touch x).tar", "no such shard"),
        ("${HOME}/a.tar", "no such shard"),
    ],
)
def test_names_that_cannot_or_must_not_be_read_say_why(name: str, word: str) -> None:
    with pytest.raises(ShardError, match=word) as caught:
        expand(name)
    assert caught.value.exit_code == 3


def test_r11_no_name_of_a_shard_starts_a_process(make_shards: Make) -> None:
    shards = [str(p) for p in make_shards(3)]
    with watch() as seen:
        for name in ("pipe:echo x", "a;touch b.tar", "`touch c`.tar", "$(touch d).tar", "|cat.tar"):
            with pytest.raises(ShardError):
                open_shards(name)
        open_shards(shards)
    assert seen.processes == []


def test_a_folder_of_splits_is_not_mixed(make_shards: Make, tmp_path: Path) -> None:
    make_shards(3, folder="all/train")
    make_shards(3, folder="all/test")
    with pytest.raises(ShardError, match="test, train"):
        expand(tmp_path / "all")


def test_a_missing_shard_is_found_at_the_start(make_shards: Make) -> None:
    shards = make_shards(30, 10)
    shards[1].unlink()
    with pytest.raises(ShardError, match=r"s-00001\.tar: no such shard"):
        open_shards(str(shards[0].parent / "s-{00000..00002}.tar"))


def test_descriptors_stay_few_with_many_shards(make_shards: Make) -> None:
    ranges = RangeReader()
    for shard in make_shards(80, 1):
        assert len(ranges.read(str(shard), 0, 10)) == 10
    assert len(ranges._files) <= 64
    ranges.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(ranges_module, "PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "shards").mkdir()
    running = Server(tmp_path / "shards")
    yield running
    running.close()


def test_remote_samples_are_read_by_range_and_equal_local_ones(server: Server, make_shards: Make) -> None:
    (shard,) = make_shards(12)
    local, remote = ShardReader(open_shards(str(shard))), ShardReader(open_shards(f"{server.url}/s-00000.tar"))
    assert [remote.read(0, i).members for i in range(12)] == [local.read(0, i).members for i in range(12)]
    assert remote.bytes_read < 2 * shard.stat().st_size


def test_a_remote_shard_without_index_is_indexed_through_ranges(server: Server, make_shards: Make) -> None:
    (shard,) = make_shards(12)
    Path(index_name(shard)).unlink()
    (index,) = open_shards(f"{server.url}/s-00000.tar?token=secret")
    assert list(index) == list(build_index(shard))


@pytest.mark.parametrize(
    "faults", [["500"], ["503", "cut"], ["reset"], ["cut", "500", "cut", "429"], ["flip"], ["flip", "cut"]]
)
def test_r22_faults_of_the_network_are_overcome(server: Server, make_shards: Make, faults: list[str]) -> None:
    (shard,) = make_shards(5)
    local, remote = ShardReader(open_shards(str(shard))), ShardReader(open_shards(f"{server.url}/s-00000.tar"))
    remote.read(0, 0)
    server.requests.clear()
    server.faults[:] = faults
    assert remote.read(0, 3).members == local.read(0, 3).members
    assert len(server.requests) == len(faults) + 1


def test_r22_all_samples_arrive_identical_through_a_flaky_server(server: Server, make_shards: Make) -> None:
    shards = make_shards(60, 20)
    local = ShardReader(open_shards([str(s) for s in shards]))
    remote = ShardReader(open_shards(f"{server.url}/s-{{00000..00002}}.tar"))
    draw = random.Random(0)
    for shard, index in enumerate(remote.shards):
        for number in range(len(index)):
            server.requests.clear()
            # At most four faults: a fifth try must find the server well.
            server.faults[:] = draw.choices(["500", "503", "429", "reset", "cut", "flip"], k=draw.choice([0, 0, 1, 4]))
            broken = len(server.faults)
            assert remote.read(shard, number).members == local.read(shard, number).members
            assert len(server.requests) <= broken + 2  # the shard's size is asked for once
            assert len(server.requests) <= 2 * ranges_module.TRIES


def test_a_shard_that_vanishes_is_an_error_not_a_skip(server: Server, make_shards: Make) -> None:
    (shard,) = make_shards(5)
    remote = ShardReader(open_shards(f"{server.url}/s-00000.tar"))
    remote.read(0, 0)
    server.faults[:] = ["500"] * 5
    with pytest.raises(ShardError, match="in 5 tries"):
        remote.read(0, 1)
    shard.unlink()
    with pytest.raises(ShardError, match="does not exist"):
        remote.read(0, 1)


def test_r22_content_that_changes_meanwhile_is_refused(server: Server, make_shards: Make) -> None:
    make_shards(5)
    remote = ShardReader(open_shards(f"{server.url}/s-00000.tar"))
    remote.read(0, 0)
    server.tag = "two"
    with pytest.raises(ShardError, match="changed on the server"):
        remote.read(0, 1)


def test_bytes_that_stay_wrong_are_skipped_with_a_reason(server: Server, make_shards: Make) -> None:
    make_shards(5)
    remote = ShardReader(open_shards(f"{server.url}/s-00000.tar"))
    server.faults[:] = ["", *["flip"] * 5]
    with pytest.raises(SampleError) as caught:
        remote.read(0, 1)
    assert caught.value.reason == "crc_mismatch"


def test_r29_a_server_without_ranges_and_denied_access_are_named_without_secrets(
    server: Server, make_shards: Make
) -> None:
    make_shards(5)
    url = f"{server.url}/s-00000.tar?token=secret".replace("http://", "http://user:pass@")
    for fault, word in (("no ranges", "does not serve ranges"), ("403", "403")):
        server.faults[:] = [fault]
        with pytest.raises(ShardError, match=word) as caught:
            RangeReader().read(url.replace("user:pass@", ""), 0, 4)
        assert "secret" not in str(caught.value)
    assert "secret" not in ranges_module.shown(url)
    assert "pass" not in ranges_module.shown(url)


def test_many_samples_are_read_at_once_and_in_order(server: Server, make_shards: Make) -> None:
    shards = make_shards(60, 20)
    data = bytearray(shards[1].read_bytes())
    data[open_shards(str(shards[1]))[0][3].members["json"].offset] ^= 1
    shards[1].write_bytes(bytes(data))
    places = [(shard, number) for number in range(19, -1, -1) for shard in range(3)]
    for names in ([str(s) for s in shards], f"{server.url}/s-{{00000..00002}}.tar"):
        reader = ShardReader(open_shards(names))
        found = reader.read_many(places)
        assert [type(r).__name__ for r in found].count("SampleError") == 1
        for (shard, number), result in zip(places, found, strict=True):
            if (shard, number) == (1, 3):
                assert isinstance(result, SampleError)
                assert result.reason == "crc_mismatch"
            else:
                assert result == reader.read(shard, number)
        assert reader.read_many([]) == []
        reader.close()
        assert reader.read_many(places[:1])[0] == found[0]
        assert len(pickle.loads(pickle.dumps(reader)).read_many(places[:4])) == 4
        reader.close()


def test_a_file_that_is_being_read_is_closed_only_afterwards(make_shards: Make) -> None:
    shards = [str(s) for s in make_shards(80, 1)]
    ranges = RangeReader()
    held = ranges._take(shards[0])
    for shard in shards:
        ranges.read(shard, 0, 4)
    ranges.close()
    assert os.pread(held.descriptor, 4, 0)
    ranges._give_back(held)
    with pytest.raises(OSError, match="descriptor"):
        os.pread(held.descriptor, 4, 0)


def cool(shards: list[Path]) -> None:
    """Have the system forget the shards' pages."""
    for shard in shards:
        with shard.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("lacking", [(), ("RWF_NOWAIT",), ("RWF_NOWAIT", "posix_fadvise")])
def test_samples_are_the_same_from_memory_from_the_disk_and_on_systems_that_know_less(
    make_shards: Make, monkeypatch: pytest.MonkeyPatch, lacking: tuple[str, ...]
) -> None:
    shards = make_shards(150, 20)
    places = [(number % 7, number // 7) for number in range(139, -1, -1)]
    expected = ShardReader(open_shards([str(s) for s in shards])).read_many(places)
    for prepare in (cool, lambda _: None):
        prepare(shards)
        reader = ShardReader(open_shards([str(s) for s in shards]))
        with monkeypatch.context() as system:
            for name in lacking:
                system.delattr(os, name)
            assert reader.read_many(places) == expected
        assert reader.bytes_read == sum(len(data) for sample in expected for data in sample.members.values())
        reader.close()


def test_a_shard_that_vanishes_or_shrinks_while_it_is_read_is_named(make_shards: Make) -> None:
    shards = make_shards(60, 20)
    reader = ShardReader(open_shards([str(s) for s in shards]))
    assert reader.read(2, 0).key
    os.truncate(shards[2], 1024)
    found = reader.read_many([(1, 3), (2, 19)])
    assert found[0].key == "v1.5_00023"
    assert (found[1].reason, str(shards[2]) in str(found[1])) == ("shard_differs_from_index", True)
    reader.close()
    shards[1].unlink()
    with pytest.raises(ShardError, match=r"s-00001\.tar: cannot be read"):
        reader.read_many([(0, 0), (1, 3)])


def test_a_batch_over_many_shards_holds_few_files_open(make_shards: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards(200, 1)
    reader = ShardReader(open_shards([str(s) for s in shards]))
    descriptors: list[int] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *a: descriptors.append(real(*a)) or descriptors[-1])
    found = reader.read_many([(number, 0) for number in range(200)])
    assert [sample.key for sample in found] == [f"v1.5_{number:05d}" for number in range(200)]
    # Numbers are given again as soon as they are free.
    assert len(set(descriptors)) < 140
    reader.close()
