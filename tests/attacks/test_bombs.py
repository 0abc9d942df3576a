"""Small files that claim to be large: each is refused with a sentence, in little memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20

BOMBS = r"""
import gzip, io, json, os, resource, struct, sys, tarfile, zipfile, zlib
from pathlib import Path

import numpy as np

from data_pipelines.importers import open_rows
from data_pipelines.index import build_index
from data_pipelines.latents import read_array
from data_pipelines.pack import write_shards
from data_pipelines.reader import iter_samples
from data_pipelines.source import open_shards
from eval.statistics import read_statistics
from mmdiff import config
from mmdiff.commands.recipe import RunConfig
from mmdiff.errors import MmdiffError, SampleError
from mmdiff.images import decode

folder = Path(sys.argv[1])


def header(shape):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return out.getvalue() + b"\0" * 64


def sparse_tar():
    info = tarfile.TarInfo("a.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 400 << 20
    (folder / "sparse.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    build_index(folder / "sparse.tar")


def zeros(mib):
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", mtime=0) as packed:
        for _ in range(mib):
            packed.write(bytes(1 << 20))
    return stream.getvalue()


def gzipped_tar():
    (folder / "a.tar.gz").write_bytes(zeros(300))
    build_index(folder / "a.tar.gz")


def gzipped_member():
    path = folder / "member.tar"
    with tarfile.open(path, "w") as out:
        info = tarfile.TarInfo("a.txt.gz")
        data = zeros(100)
        info.size = len(data)
        out.addfile(info, io.BytesIO(data))
    (index,) = open_shards(str(path))
    raise SampleError("ignored", f"{len(index)} samples, {dict(index.ignored)} ignored")


def large_png():
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj()
    row = bytes(1 + 13_000)
    body = b"".join(packer.compress(row) for _ in range(13_000)) + packer.flush()
    size = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 0, 0, 0, 0)
    decode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def member_array():
    if read_array(header((10**9,))) is None:
        raise SampleError("bad_codes", "an array without its content is none")


def statistics():
    path = folder / "statistics.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("mu.npy", header((10**9,)))
        out.writestr("sigma.npy", header((10**9,)))
    read_statistics(path)


def yaml_aliases():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (folder / "bomb.yaml").write_text("\n".join(lines))
    config.load(RunConfig, folder / "bomb.yaml")


def index_file():
    shard = write_shards([("a", {"txt": b"x"})], folder / "idx", "s")[0]
    Path(f"{shard}.idx.json").write_text("[" * 200_000)
    open_shards(str(shard))


def nested_json():
    write_shards([("a", {"json": b"[" * 200_000})], folder / "nested", "s")
    ((sample, _),) = iter_samples(str(folder / "nested"))
    sample.info()


def llava_json():
    (folder / "llava.json").write_text("[" * 200_000)
    list(open_rows(folder / "llava.json"))


def resident(peak):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:" if peak else "VmRSS:"):
            return int(line.split()[1]) << 10


limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + (600 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
for bomb in json.loads(sys.argv[2]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident(False)
    try:
        globals()[bomb]()
        said = "nothing was refused"
    except MmdiffError as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([bomb, said, resident(True) - before]), flush=True)
"""

EXPECTED = {
    "sparse_tar": "ShardError: .*sparse",
    "gzipped_tar": "ShardError: .*compressed",
    "gzipped_member": r"SampleError: 0 samples, .*\.gz",
    "large_png": "SampleError: .*169,000,000 pixels",
    "member_array": "SampleError",
    "statistics": r"ConfigError: .*statistics\.npz: mu\.npy claims 8,000,000,000 bytes and holds 64",
    "yaml_aliases": "ConfigError: .*aliases",
    "index_file": "ShardError: .*not a valid index",
    "nested_json": "SampleError: .*cannot be read",
    "llava_json": "ConfigError: .*is not JSON",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, tuple[str, int]]:
    """What was said of each bomb, and by how many bytes the process grew meanwhile; one process for all of them."""
    folder = tmp_path_factory.mktemp("bombs")
    command = [sys.executable, "-c", BOMBS, str(folder), json.dumps(list(EXPECTED))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name: (said, grown) for name, said, grown in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("bomb", EXPECTED)
def test_r09_bombs_are_refused_within_64_mib_of_memory(results: dict[str, tuple[str, int]], bomb: str) -> None:
    said, grown = results[bomb]
    assert re.match(EXPECTED[bomb], said), said
    assert grown < 64 * MIB
