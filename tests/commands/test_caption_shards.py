"""Bulk captioning: shards in, shards out, whatever happens in between."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipelines.pack import write_shards
from data_pipelines.reader import iter_samples
from mmdiff.cli import app
from mmdiff.commands.caption_shards import caption_shards
from mmdiff.commands.workers import BatchSize
from mmdiff.errors import ConfigError, ShardError
from mmdiff.pipelines import Pipeline
from tests.helpers import tiny

BROKEN = 3
"""Number of the sample whose picture is none."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder, samples = tmp_path_factory.mktemp("shards"), []
    for i in range(20):
        png = io.BytesIO()
        tiny.picture(i, 10 + i, 12).save(png, "PNG")
        info = {"source": f"made-up {i}", "caption": "an old one"}
        data = b"no picture" if i == BROKEN else png.getvalue()
        samples.append((f"s{i:02d}", {"png": data, "json": json.dumps(info).encode()}))
    write_shards(samples, folder, "made", samples_per_shard=8)
    return folder


def describe(pictures):
    return [f"{p.width} wide" for p in pictures]


def run(shards: Path, out: Path, describer=describe, **options):
    return caption_shards(describer, [str(shards)], out, {"prompt": "?"}, progress=False, **options)


def told(out: Path) -> dict[str, dict]:
    return {s.key: s.info() for s, _ in iter_samples(str(out))}


def files(out: Path) -> dict[str, bytes]:
    """All files but the sentences on skipped samples, which quote Pillow."""
    return {p.name: p.read_bytes().partition(b'"message"')[0] for p in out.iterdir()}


def test_every_sample_comes_out_with_its_caption_and_the_rest_of_it(shards, tmp_path):
    report = run(shards, tmp_path)
    assert (report.shards, report.samples, report.captioned) == (3, 20, 19)
    assert report.skipped == {"undecodable_image": 1}
    assert [p.name for p in sorted(tmp_path.glob("*.tar"))] == ["made-00000.tar", "made-00001.tar", "made-00002.tar"]
    found = told(tmp_path)
    assert len(found) == 19
    assert found["s05"] == {"source": "made-up 5", "caption": "15 wide"}
    line = json.loads((tmp_path / "made-00000.tar.skipped.jsonl").read_text())
    assert (line["key"], line["reason"]) == ("s03", "undecodable_image")


def test_another_field_leaves_the_old_caption(shards, tmp_path):
    run(shards, tmp_path, field="short")
    assert told(tmp_path)["s05"] == {"source": "made-up 5", "caption": "an old one", "short": "15 wide"}


@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_a_killed_run_goes_on_where_it_was_and_gives_the_same_bytes(shards, tmp_path, after):
    run(shards, tmp_path / "whole", batch=2)
    calls = []

    def dying(pictures):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(len(pictures))
        return describe(pictures)

    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run(shards, out, dying, batch=2)
    for journal in out.glob(".*.jsonl"):
        with journal.open("a") as file:
            file.write('{"n": 7, "te')  # the half line of a process that died while writing
    report = run(shards, out, batch=2)
    assert report.captioned == 19 - sum(calls)
    assert report.skipped == {"undecodable_image": 1}
    assert files(out) == files(tmp_path / "whole")
    assert run(shards, out).captioned == 0


def test_processes_share_the_shards_and_together_make_what_one_makes(shards, tmp_path):
    run(shards, tmp_path / "one")
    parts = [run(shards, tmp_path / "two", rank=rank, world=2) for rank in range(2)]
    assert [p.shards for p in parts] == [2, 1]
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(shards, tmp_path):
    sizes = []

    def greedy(pictures):
        sizes.append(len(pictures))
        if len(pictures) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return describe(pictures)

    report = run(shards, tmp_path / "greedy", greedy, batch=8)
    assert report.batch == 2
    assert sizes[:4] == [7, 3, 4, 2]  # one of the first four is no picture
    run(shards, tmp_path / "whole")
    assert files(tmp_path / "greedy") == files(tmp_path / "whole")

    def hopeless(pictures):
        raise MemoryError

    with pytest.raises(ConfigError, match="memory ran out for a single item"):
        run(shards, tmp_path / "hopeless", hopeless, batch=4)

    def broken(pictures):
        raise RuntimeError("another fault")

    with pytest.raises(RuntimeError, match="another fault"):
        run(shards, tmp_path / "broken", broken)


def test_batch_size_grows_while_that_is_faster_and_never_again_after_memory_ran_out():
    size, seen = BatchSize(), []
    for _ in range(6):
        seen.append(size.size)
        size.went_well(size.size, 1.0 if size.size < 8 else 2.5)  # from 8 on no faster
    assert seen == [1, 2, 4, 8, 4, 4]
    size.was_too_large(MemoryError())
    size.went_well(2, 0.001)
    assert size.size == 2
    asked = BatchSize(16)
    asked.went_well(16, 0.001)
    assert asked.size == 16


def test_a_folder_of_other_settings_or_shards_of_one_name_are_refused(shards, tmp_path):
    run(shards, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"other settings \(field differ\)"):
        run(shards, tmp_path / "out", field="other")
    twin = tmp_path / "twin"
    twin.mkdir()
    for path in shards.iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match=r"several shards are called made-00000\.tar"):
        caption_shards(describe, [str(shards), str(twin)], tmp_path / "new", {}, progress=False)


def test_a_shard_of_which_nothing_can_be_described_is_an_error(tmp_path):
    write_shards([("a", {"png": b"none"}), ("b", {"txt": b"text"})], tmp_path / "in", "bad")
    with pytest.raises(ShardError, match="none of 2 samples could be described"):
        run(tmp_path / "in", tmp_path / "out")


def test_the_command_describes_shards_with_a_model(shards, tmp_path):
    Pipeline(tiny.llada_v_checkpoint()).save_pretrained(tmp_path / "model")
    words = ["caption", str(tmp_path / "model"), str(shards / "made-00002.tar"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--gen-length", "4", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["samples"], report["captioned"], report["skipped"]) == (4, 4, {})
    one = CliRunner().invoke(app, [*words, "--gen-length", "4", "--device", "cpu", "--batch", "2"])
    assert "0 of 4 samples described now" in one.stderr
    first = next(s for s, _ in iter_samples(str(tmp_path / "out")))
    (tmp_path / "a.png").write_bytes(first.image())
    alone = ["caption", str(tmp_path / "model"), str(tmp_path / "a.png"), "--gen-length", "4", "--device", "cpu"]
    assert CliRunner().invoke(app, alone).stdout.strip() == first.info()["caption"]
    other = CliRunner().invoke(app, [*words, "--gen-length", "8", "--device", "cpu"])
    assert other.exit_code == 2
