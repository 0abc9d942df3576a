"""The benchmark of reading and decoding runs, and every way it compares reads every sample."""

from __future__ import annotations

import re

import pytest

from benchmarks.loader import decoders, main, make, ours, raw, webdatasets

pytestmark = pytest.mark.filterwarnings(  # torchvision's decoder is deprecated, webdataset leaves files open
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def test_every_way_reads_every_sample(tmp_path):
    shards = make(tmp_path, 150, 3000)
    assert [way(shards)() for way in (ours, webdatasets, raw)] == [150, 150, 150]
    assert raw(shards, checked=True)() == 150
    assert {way() for way in decoders(shards, 4).values()} == {4}


def test_it_prints_ratios_for_everything_it_compares(capsys):
    main(["--samples", "300", "--bytes", "3000", "--rounds", "1"])
    text = capsys.readouterr().out
    assert len(re.findall(r"ours / webdataset +\d", text)) == 3
    assert len(re.findall(r"ours / raw\+crc32 +\d", text)) == 3
    assert re.search(r"position 1,000,000: [\d.]+ ms +ratio \d", text)
