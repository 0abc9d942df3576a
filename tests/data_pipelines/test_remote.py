"""Object stores through fsspec: s3, gs and hf addresses on file systems in memory that fail on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_pipelines import ranges as ranges_module
from data_pipelines.http import InterruptedTransferError
from data_pipelines.index import index_name
from data_pipelines.ranges import RangeReader
from data_pipelines.reader import ShardReader
from data_pipelines.source import expand, open_shards
from mmdiff.errors import MissingExtraError, SampleError, ShardError

Make = Callable[..., list[Path]]
SCHEMES = ("s3", "gs", "hf")


class Store(MemoryFileSystem):
    """A memory file system of its own, under any scheme."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    protocol = SCHEMES
    faults: ClassVar[list[Exception]] = []
    calls: ClassVar[list[tuple[str, Any, Any]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.partition("://")[2].strip("/") if "://" in path else "/" + path.strip("/")

    def glob(self, path: str, *rest: Any, **options: Any) -> Any:
        return [name.lstrip("/") for name in super().glob(path, *rest, **options)]  # as the object stores name things

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        Store.calls.append((path, start, end))
        if Store.faults:
            raise Store.faults.pop(0)
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    monkeypatch.setattr(ranges_module, "PAUSE_SECONDS", 0.0)
    real = fsspec.filesystem
    monkeypatch.setattr(fsspec, "filesystem", lambda s, **o: Store() if s in SCHEMES else real(s, **o))

    def fill(shards: list[Path], url: str, indexes: bool = True) -> None:
        for shard in shards:
            Store().pipe_file(f"{url}/{shard.name}", shard.read_bytes())
            if indexes:
                Store().pipe_file(f"{url}/{shard.name}.idx.json", Path(index_name(shard)).read_bytes())

    Store.calls.clear()
    yield fill
    Store.store.clear()
    Store.faults.clear()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("indexes", [True, False])
def test_shards_in_object_stores_give_the_samples_of_local_ones(
    make_shards: Make, store: Callable[..., None], scheme: str, indexes: bool
) -> None:
    shards = make_shards(25, 10)
    store(shards, f"{scheme}://bucket/data", indexes)
    names = [f"{scheme}://bucket/data/{shard.name}" for shard in shards]
    assert expand(f"{scheme}://bucket/data/s-*.tar") == expand(f"{scheme}://bucket/data/") == names
    assert expand(f"{scheme}://bucket/data/s-{{00000..00002}}.tar") == names
    local, remote = ShardReader(open_shards([str(s) for s in shards])), ShardReader(open_shards(names))
    for shard, index in enumerate(remote.shards):
        assert [remote.read(shard, i).members for i in range(len(index))] == [
            local.read(shard, i).members for i in range(len(index))
        ]


def test_r22_faults_of_a_store_are_overcome_and_a_lasting_one_is_an_error(
    make_shards: Make, store: Callable[..., None]
) -> None:
    (shard,) = make_shards(5)
    store([shard], "s3://bucket")
    local, remote = ShardReader(open_shards(str(shard))), ShardReader(open_shards(f"s3://bucket/{shard.name}"))
    for faults in ([OSError("slow down")], [TimeoutError(), ConnectionResetError(), OSError("x"), OSError("y")]):
        Store.faults[:] = faults
        assert remote.read(0, 1).members == local.read(0, 1).members
    Store.faults[:] = [OSError("slow down")] * 5
    with pytest.raises(ShardError, match=r"s3://bucket/s-00000\.tar: could not be read in 5 tries \(slow down\)"):
        remote.read(0, 2)
    Store.faults[:] = [KeyError("a mistake in a program is not tried again")]
    with pytest.raises(KeyError):
        remote.read(0, 2)


def test_r22_a_broken_transfer_goes_on_at_the_byte_where_it_broke(
    make_shards: Make, store: Callable[..., None]
) -> None:
    (shard,) = make_shards(5)
    store([shard], "gs://bucket")
    whole = shard.read_bytes()
    Store.faults[:] = [InterruptedTransferError("cut", whole[100:140]), InterruptedTransferError("cut", whole[140:150])]
    assert RangeReader().read(f"gs://bucket/{shard.name}", 100, 400) == whole[100:500]
    assert [(start, end) for _, start, end in Store.calls] == [(100, 500), (140, 500), (150, 500)]


def test_a_shard_that_is_not_in_its_store_is_an_error_at_the_start(
    make_shards: Make, store: Callable[..., None]
) -> None:
    shards = make_shards(25, 10)
    store(shards, "s3://bucket")
    Store().rm_file("s3://bucket/s-00001.tar")  # its index is still there
    with pytest.raises(ShardError, match=r"s3://bucket/s-00001\.tar: does not exist"):
        open_shards("s3://bucket/s-{00000..00002}.tar")
    with pytest.raises(ShardError, match="no shard matches"):
        expand("s3://other/*.tar")


def test_a_shard_that_differs_from_its_index_is_skipped_as_a_whole_with_one_reason(
    make_shards: Make, store: Callable[..., None]
) -> None:
    (shard,) = make_shards(5)
    store([shard], "s3://bucket")
    Store().pipe_file(f"s3://bucket/{shard.name}", shard.read_bytes()[:-2000])
    with pytest.raises(ShardError, match="its index says"):
        open_shards(f"s3://bucket/{shard.name}")
    reader = ShardReader(open_shards(f"s3://bucket/{shard.name}", damaged="skip"))
    for number in range(5):
        with pytest.raises(SampleError, match="its index says") as caught:
            reader.read(0, number)
        assert caught.value.reason == "shard_differs_from_index"


def test_a_client_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str) -> Any:
        raise ImportError("no s3fs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'mmdiff\[remote\]'"):
        RangeReader().size("s3://bucket/x.tar")
