"""Finding shards: names, patterns, refused addresses, remote reads with faults."""

from __future__ import annotations

import http.server
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipelines import ranges as ranges_module
from data_pipelines.index import build_index, index_name
from data_pipelines.ranges import RangeReader
from data_pipelines.reader import ShardReader
from data_pipelines.source import expand, open_shards
from mmdiff.errors import SampleError, ShardError

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


def test_no_name_of_a_shard_starts_a_process(make_shards: Make) -> None:
    started: list[str] = []
    watching = True

    def hook(event: str, args: tuple) -> None:
        if watching and event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
            started.append(event)

    sys.addaudithook(hook)
    for name in ("pipe:echo x", "a;touch b.tar", "`touch c`.tar", "$(touch d).tar", "|cat.tar"):
        with pytest.raises(ShardError):
            open_shards(name)
    open_shards([str(p) for p in make_shards(3)])
    watching = False
    assert started == []


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


class Server:
    """A web server with ranges that fails on demand."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self.tag = "one"
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                span = self.headers.get("Range", "")
                outer.requests.append((self.path, span))
                fault = outer.faults.pop(0) if outer.faults else ""
                file = folder / self.path.lstrip("/").split("?")[0]
                if fault.isdigit() or not file.is_file():
                    self.send_error(int(fault) if fault else 404)
                    return
                data = file.read_bytes()
                first, last = (int(x) for x in re.fullmatch(r"bytes=(\d+)-(\d+)", span).groups())  # type: ignore[union-attr]
                part = data[first : last + 1]
                self.send_response(200 if fault == "no ranges" else 206)
                self.send_header("ETag", f'"{outer.tag}"')
                self.send_header("Content-Length", str(len(part)))
                self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
                self.end_headers()
                if fault == "cut":
                    part = part[: len(part) // 2]
                if fault == "flip":
                    part = bytes([part[0] ^ 1]) + part[1:]
                self.wfile.write(part)
                self.close_connection = True

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


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


@pytest.mark.parametrize("faults", [["500"], ["503", "cut"], ["cut", "500", "cut", "429"], ["flip"], ["flip", "cut"]])
def test_faults_of_the_network_are_overcome(server: Server, make_shards: Make, faults: list[str]) -> None:
    (shard,) = make_shards(5)
    local, remote = ShardReader(open_shards(str(shard))), ShardReader(open_shards(f"{server.url}/s-00000.tar"))
    remote.read(0, 0)
    server.requests.clear()
    server.faults[:] = faults
    assert remote.read(0, 3).members == local.read(0, 3).members
    assert len(server.requests) == len(faults) + 1


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


def test_content_that_changes_meanwhile_is_refused(server: Server, make_shards: Make) -> None:
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


def test_a_server_without_ranges_and_denied_access_are_named_without_secrets(server: Server, make_shards: Make) -> None:
    make_shards(5)
    url = f"{server.url}/s-00000.tar?token=secret".replace("http://", "http://user:pass@")
    for fault, word in (("no ranges", "does not serve ranges"), ("403", "403")):
        server.faults[:] = [fault]
        with pytest.raises(ShardError, match=word) as caught:
            RangeReader().read(url.replace("user:pass@", ""), 0, 4)
        assert "secret" not in str(caught.value)
    assert "secret" not in ranges_module.shown(url)
    assert "pass" not in ranges_module.shown(url)
