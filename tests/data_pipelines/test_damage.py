"""Damaged shards: nothing crashes, nothing hangs, no sample is lost without a reason."""

from __future__ import annotations

import io
import random
import resource
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipelines.index import build_index, read_index, write_index
from data_pipelines.reader import ShardReader, iter_samples
from data_pipelines.source import open_shards
from mmdiff.errors import SampleError, ShardError

from .conftest import members

Make = Callable[..., list[Path]]
REASONS = {"shard_differs_from_index", "crc_mismatch"}


@pytest.fixture
def alarm() -> Iterator[None]:
    """Anything that takes five seconds is a hang."""

    def ring(number: int, frame: object) -> None:
        raise TimeoutError("hung")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def tally(shard: Path) -> tuple[dict[str, dict[str, bytes]], dict[str, int]]:
    """Samples that were yielded, and skips by reason, of a shard with its old index."""
    reader = ShardReader([read_index(f"{shard}.idx.json", url=str(shard))])
    yielded: dict[str, dict[str, bytes]] = {}
    skipped: dict[str, int] = {}
    for number in range(len(reader.shards[0])):
        try:
            sample = reader.read(0, number)
        except SampleError as error:
            where = str(error).partition(": ")[0]
            skipped[error.reason if where == str(shard) else "unnamed"] = skipped.get(error.reason, 0) + 1
        else:
            yielded[sample.key] = dict(sample.members)
    reader.close()
    return yielded, skipped


def try_to_index(shard: Path) -> int | None:
    """Samples of a new index of a damaged shard, None if it is refused with a sentence."""
    try:
        return len(build_index(shard))
    except ShardError as error:
        return None if str(shard) in str(error) else -1


def test_r07_a_shard_cut_at_any_block_is_never_read_as_if_it_were_whole(make_shards: Make, alarm: None) -> None:
    (shard,) = make_shards(10)
    whole = shard.read_bytes()
    index = read_index(f"{shard}.idx.json", url=str(shard))
    last = max(m.offset + m.size for e in index for m in e.members.values())
    for cut in range(0, len(whole), 512):
        shard.write_bytes(whole[:cut])
        with pytest.raises(ShardError, match="its index says") as caught:
            open_shards(str(shard))
        if cut < last:
            assert f"first sample that is cut off is {index.first_beyond(cut)!r}" in str(caught.value)
            assert try_to_index(shard) is None
        else:
            assert try_to_index(shard) in (None, 10)  # only the padding is gone
        assert tally(shard) == ({}, {"shard_differs_from_index": 10})


def test_r07_a_cut_between_members_names_the_first_sample_that_is_missing(make_shards: Make) -> None:
    (shard,) = make_shards(6)
    whole = shard.read_bytes()
    with tarfile.open(shard) as opened:
        starts = [(m.offset, m.name) for m in opened]
    for offset, name in starts[1:]:
        shard.write_bytes(whole[:offset])
        with pytest.raises(ShardError, match="was cut"):
            build_index(shard)
        with pytest.raises(ShardError, match=f"cut off is '{name[:10]}'"):
            open_shards(str(shard))


def test_r06_every_flipped_bit_in_a_member_is_noticed(make_shards: Make) -> None:
    (shard,) = make_shards(8)
    whole = shard.read_bytes()
    index = read_index(f"{shard}.idx.json", url=str(shard))
    original, none = tally(shard)
    assert (len(original), none) == (8, {})
    draw = random.Random(0)
    for _ in range(60):
        entry = index[draw.randrange(8)]
        member = draw.choice(list(entry.members.values()))
        damaged = bytearray(whole)
        damaged[member.offset + draw.randrange(member.size)] ^= 1 << draw.randrange(8)
        shard.write_bytes(bytes(damaged))
        yielded, skipped = tally(shard)
        assert skipped == {"crc_mismatch": 1}
        assert yielded == {k: v for k, v in original.items() if k != entry.key}


def flip(data: bytearray, draw: random.Random) -> bytes:
    for _ in range(draw.choice([1, 3, 30, 300])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def cut(data: bytearray, draw: random.Random) -> bytes:
    return bytes(data[: draw.randrange(len(data))])


def overwrite(data: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    data[start : start + 512] = draw.randbytes(min(512, len(data) - start))
    return bytes(data)


def swap_blocks(data: bytearray, draw: random.Random) -> bytes:
    a, b = (512 * draw.randrange(len(data) // 512) for _ in range(2))
    data[a : a + 512], data[b : b + 512] = data[b : b + 512], data[a : a + 512]
    return bytes(data)


def zero_block(data: bytearray, draw: random.Random) -> bytes:
    start = 512 * draw.randrange(len(data) // 512)
    data[start : start + 512] = bytes(512)
    return bytes(data)


def grow(data: bytearray, draw: random.Random) -> bytes:
    return bytes(data) + draw.randbytes(draw.choice([1, 512, 10_240]))


def change_header(data: bytearray, draw: random.Random) -> bytes:
    """A random field of a random header, with a checksum that fits."""
    headers = [p for p in range(0, len(data), 512) if data[p + 257 : p + 262] == b"ustar"]
    start = draw.choice(headers)
    field, size = draw.choice([(0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
    data[start + field : start + field + size] = draw.choice(
        [draw.randbytes(size), b"\xff" * size, b"7" * size, b"\0" * size, b"\x80" + b"\xff" * (size - 1)]
    )[:size]
    block = data[start : start + 512]
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    data[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(data)


def hostile_entry(data: bytearray, draw: random.Random) -> bytes:
    """Another tar of the same samples with one strange entry among them."""
    info = tarfile.TarInfo(draw.choice(["v1.5_00002.png", "x.png", "../../x.png", "/abs.png", "ü" * 200 + ".png"]))
    info.type = draw.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, b"Z", b"0"])
    info.linkname = "/etc/passwd"
    if draw.random() < 0.5:
        info.pax_headers = {"GNU.sparse.realsize": str(1 << 50), "comment": "x" * draw.choice([1, 5000])}
    if draw.random() < 0.3:
        info.pax_headers = {"size": draw.choice(["-1", "x", "9" * 30, "0"])}
    return _tar_with(info, tarfile.PAX_FORMAT)


def hostile_name(data: bytearray, draw: random.Random) -> bytes:
    """A name that is not UTF-8, or one that is there already."""
    info = tarfile.TarInfo(
        draw.choice(["\udcff\udcfe.png", "v1.5_00001.png", "V1.5_00001.PNG", "a\x01\n\r.png", ".png"])
    )
    return _tar_with(info, tarfile.GNU_FORMAT)


def extended_header_bomb(data: bytearray, draw: random.Random) -> bytes:
    """Extended headers that are too large, endless, or lie about the length of their records."""
    info = tarfile.TarInfo("x.png")
    kind = draw.choice(["large", "many", "claim"])
    if kind == "claim":
        out = bytearray(_tar_with(None, tarfile.PAX_FORMAT))
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, draw.choice([1 << 20, 1 << 33, 1 << 60])
        return header.tobuf(tarfile.GNU_FORMAT) + bytes(out)
    comment = {"large": {"comment": "y" * (1 << 21)}, "many": {f"k{i}": "v" for i in range(3000)}}[kind]
    info.pax_headers = comment
    return _tar_with(info, tarfile.PAX_FORMAT)


def _tar_with(info: tarfile.TarInfo | None, form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, errors="surrogateescape") as tar:
        for number in range(3):
            for suffix, content in members(number).items():
                plain = tarfile.TarInfo(f"v1.5_{number:05d}.{suffix}")
                plain.size = len(content)
                tar.addfile(plain, io.BytesIO(content))
            if number == 1 and info is not None:
                tar.addfile(info, io.BytesIO(b""))
    return out.getvalue()


DAMAGES = [flip, cut, overwrite, swap_blocks, zero_block, grow, change_header, hostile_entry]
DAMAGES += [hostile_name, extended_header_bomb]


def fuzz(make_shards: Make, rounds: int, seed: int) -> dict[str, int]:
    (shard,) = make_shards(12)
    whole = shard.read_bytes()
    original, _ = tally(shard)
    draw = random.Random(seed)
    seen: dict[str, int] = {}
    for _ in range(rounds):
        signal.alarm(5)
        shard.write_bytes(draw.choice(DAMAGES)(bytearray(whole), draw))
        yielded, skipped = tally(shard)
        assert len(yielded) + sum(skipped.values()) == 12
        assert skipped.keys() <= REASONS
        assert all(original[key] == content for key, content in yielded.items())
        fresh = try_to_index(shard)
        seen["refused" if fresh is None else "indexed"] = seen.get("refused" if fresh is None else "indexed", 0) + 1
        assert fresh != -1
        if fresh is not None:
            new = build_index(shard)
            assert list(new) == list(read_index(write_index(new, shard.parent / "fresh.idx.json"), url=str(shard)))
        for reason in skipped:
            seen[reason] = seen.get(reason, 0) + 1
    return seen


def test_r06_1000_damaged_shards_yield_or_skip_every_sample_of_the_index(make_shards: Make, alarm: None) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = fuzz(make_shards, 1000, 0)
    assert seen.keys() == {"refused", "indexed", *REASONS}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kilobytes


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_r06_thousands_more_damaged_shards(make_shards: Make, alarm: None, seed: int) -> None:
    assert fuzz(make_shards, 1000, seed)["refused"] > 100


def test_samples_once_through_names_what_cannot_be_read(make_shards: Make) -> None:
    (shard,) = make_shards(5)
    data = bytearray(shard.read_bytes())
    data[read_index(f"{shard}.idx.json", url=str(shard))[2].members["json"].offset] ^= 1
    shard.write_bytes(bytes(data))
    results = list(iter_samples(str(shard), suffixes=("json", "png")))
    assert [sample.key if sample else error.reason for sample, error in results if sample or error] == [
        "v1.5_00000",
        "v1.5_00001",
        "crc_mismatch",
        "v1.5_00003",
        "v1.5_00004",
    ]
    assert {s for sample, _ in results if sample for s in sample.members} == {"json", "png"}
