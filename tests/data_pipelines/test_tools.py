"""Code caches, lint, statistics and importers."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.cache import CACHE_FILE, cache
from data_pipelines.importers import Extra, open_rows
from data_pipelines.lint import lint
from data_pipelines.pack import write_shards
from data_pipelines.reader import Sample, iter_samples
from data_pipelines.stats import histogram, stats, texts_of
from data_pipelines.task_config import TextToImageConfig
from data_pipelines.tasks import build_task
from mmdiff.batch import Layout
from mmdiff.errors import ConfigError, SampleError, ShardError
from mmdiff.rng import generator
from mmdiff.text import Tokenizer

from .conftest import members, png

Make = Callable[..., list[Path]]


def encode(pixels: Tensor) -> Tensor:
    """Codes that tell the image: its red channel on a 4 by 4 grid."""
    assert pixels.abs().max() <= 1
    return (pixels[:, 0, ::4, ::4] + 1).mul(127.5).round().long()


def all_samples(shards: list[Path]) -> list[Sample]:
    return [s for s, _ in iter_samples([str(p) for p in shards]) if s is not None]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_cached_shards_hold_every_sample_with_its_codes(make_shards: Make, tmp_path: Path, batch: int) -> None:
    shards = make_shards(20, 8)
    report = cache([str(p) for p in shards], tmp_path / "out", encode, 16, batch, "abc", samples_per_shard=9)
    assert (report.samples, report.grid, dict(report.skipped), len(report.shards)) == (20, (4, 4), {}, 3)
    for old, new in zip(all_samples(shards), all_samples(list(report.shards)), strict=True):
        assert new.key == old.key
        assert {k: v for k, v in new.members.items() if k != "codes.npy"} == {
            k: v for k, v in old.members.items() if k != "codes.npy"
        }
        codes = np.load(io.BytesIO(new.members["codes.npy"]))
        assert codes.dtype == np.int16
        assert codes.shape == (4, 4)
        assert (codes == int(new.key[-5:])).all()
    note = json.loads((tmp_path / "out" / CACHE_FILE).read_text())
    assert (note["encoder"], note["grid"], note["samples"]) == ("abc", [4, 4], 20)
    assert str(tmp_path) not in json.dumps(note)


def test_cached_codes_are_what_the_task_reads(make_shards: Make, tmp_path: Path, tokenizer: Tokenizer) -> None:
    report = cache(str(make_shards(3)[0]), tmp_path / "out", encode, 16, 2, "abc")
    layout = Layout(vocab_size=tokenizer.vocab_size, codes=16, codebook=256)
    task = build_task(TextToImageConfig(), tokenizer, layout)
    example = task(all_samples(list(report.shards))[2], generator(0))
    assert example.ids[-16:].tolist() == [layout.code_offset + 2] * 16


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_further_pictures_get_codes_of_their_own_when_asked_for(tmp_path: Path, batch: int) -> None:
    rows = [(f"k{i}", members(i) | {f"image{n}.png": png(10 * i + n) for n in range(2, 2 + i)}) for i in range(4)]
    (shard,) = write_shards(rows, tmp_path / "in", "s")
    report = cache(str(shard), tmp_path / "out", encode, 16, batch, "abc", others=True, flips=True)
    assert (report.samples, report.grid) == (4, (4, 4))
    for i, made in enumerate(all_samples(list(report.shards))):
        names = ["", *(f"image{n}." for n in range(2, 2 + i))]
        told = {n.removesuffix("codes.npy"): v for n, v in made.members.items() if n.endswith("codes.npy")}
        assert list(told) == names
        assert sum(n.endswith("codes_flip.npy") for n in made.members) == len(names)
        assert [int(np.load(io.BytesIO(told[n])).max()) for n in names] == [i, *(10 * i + n for n in range(2, 2 + i))]
    plain = cache(str(shard), tmp_path / "plain", encode, 16, batch, "abc")
    assert not any("image2.codes.npy" in s.members for s in all_samples(list(plain.shards)))


def test_large_codebooks_are_kept_whole(make_shards: Make, tmp_path: Path) -> None:
    report = cache(str(make_shards(2)[0]), tmp_path / "o", lambda x: torch.full((len(x), 4, 4), 60_000), 16, 2, "abc")
    assert np.load(io.BytesIO(all_samples(list(report.shards))[0].members["codes.npy"])).max() == 60_000


def test_caching_counts_what_it_leaves_out_and_stops_at_too_much(tmp_path: Path) -> None:
    rows = [(f"k{i}", members(i) | ({"png": b"junk"} if i == 3 else {})) for i in range(10)]
    (shard,) = write_shards(rows, tmp_path / "in", "s")
    report = cache(str(shard), tmp_path / "out", encode, 16, 4, "abc", max_skip_fraction=0.2)
    assert (report.samples, dict(report.skipped)) == (9, {"undecodable_image": 1})
    with pytest.raises(ShardError, match="undecodable_image 1"):
        cache(str(shard), tmp_path / "out2", encode, 16, 4, "abc")
    with pytest.raises(ConfigError, match="another folder"):
        cache(str(shard), tmp_path / "in", encode, 16, 4, "abc")
    with pytest.raises(ConfigError, match="expected integers"):
        cache(str(shard), tmp_path / "out3", lambda x: x, 16, 4, "abc", max_skip_fraction=0.2)


def found(shards: list[Path] | Path) -> dict[str, int]:
    names = [shards] if isinstance(shards, Path) else shards
    return {f.code: f.count for f in lint([str(p) for p in names]).findings}


def test_good_shards_have_no_findings(make_shards: Make) -> None:
    report = lint([str(p) for p in make_shards(25, 10)])
    assert (report.shards, report.samples, report.findings, report.errors) == (3, 25, (), 0)
    assert "nothing to complain about" in str(report)


def test_lint_says_what_training_would_skip(tmp_path: Path) -> None:
    rows = [("a", members(0)), ("b", members(1) | {"png": b"junk"}), ("c", {"json": b"{", "png": png(2)})]
    rows += [("d", {"txt": b"\xff", "png": png(3)}), ("e", {"json": b'{"x": 1}', "png": png(4)})]
    shards = write_shards(rows, tmp_path, "s")
    assert found(shards) == {"undecodable_image": 1, "bad_json": 1, "bad_text": 1, "no_caption": 1}
    report = lint(str(shards[0]))
    assert report.errors == 3
    text = str(report)
    assert "error: undecodable_image (1)" in text
    assert f"    {shards[0]}: b" in text
    assert found(shards) == {f.code: f.count for f in lint(str(shards[0]), images=True).findings}
    assert "undecodable_image" not in {f.code for f in lint(str(shards[0]), images=False).findings}


def test_lint_finds_half_samples_ignored_members_and_duplicates(tmp_path: Path, make_shards: Make) -> None:
    halves = write_shards(
        [(f"img_{i}", {"png": png(i)}) for i in range(3)] + [(f"cap_{i}", {"txt": b"x"}) for i in range(3)],
        tmp_path,
        "h",
    )
    assert found(halves) == {"half_samples": 1, "missing_text": 3, "missing_image": 3}
    path = tmp_path / "p.tar"
    with tarfile.open(path, "w") as out:
        for name in ("a.png", "a.txt", "a.pkl", "b.pth"):
            info = tarfile.TarInfo(name)
            data = png(1) if name.endswith("png") else b"yes"
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    assert found(path) == {"ignored_suffix": 2}
    one, two = make_shards(3, folder="one"), make_shards(3, folder="two")
    assert found(one + two) == {"duplicate_key": 3}


def test_lint_finds_conversations_that_show_more_than_there_is(tmp_path: Path) -> None:
    def talk(count: int) -> bytes:
        turns = [{"from": "human", "value": "<image>" * count + "what?"}, {"from": "gpt", "value": "a fox"}]
        return json.dumps({"conversations": turns}).encode()

    two = {"png": png(1), "image2.png": png(2)}
    rows = [("a", {**two, "json": talk(2)}), ("b", {**two, "json": talk(3)}), ("c", {"json": talk(1)})]
    (shard,) = write_shards(rows, tmp_path, "s")
    report = lint(str(shard))
    assert {f.code: f.count for f in report.findings} == {"too_few_images": 2, "missing_image": 1}
    assert f"{shard}: b: 3 shown, 2 held" in str(report)


def test_lint_reports_broken_shards_and_goes_on(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards(30, 10)
    shards[0].write_bytes(shards[0].read_bytes()[:5000])
    Path(f"{shards[1]}.idx.json").write_text("{")
    data = bytearray(shards[2].read_bytes())
    data[600] ^= 1
    shards[2].write_bytes(bytes(data))
    assert found(shards) == {"shard_differs_from_index": 1, "unreadable_shard": 1, "crc_mismatch": 1}


def test_stats_count_what_is_there(make_shards: Make) -> None:
    result = stats([str(p) for p in make_shards(12, 5)])
    assert (result.shards, result.samples, result.unusable) == (3, 12, 0)
    assert result.members == {"codes.npy": 12, "json": 12, "png": 12}
    assert result.image_sizes == {"16x16": 12}
    assert (result.captions, result.distinct_captions, result.caption_words, result.concepts) == (12, 12, 2.0, 5)
    assert result.questions == {"yes-no": 24, "what": 12}
    assert result.answers == {"no": 12, "thing": 12, "yes": 12}
    assert "captions             12" in str(result)


def test_stats_count_images_tokens_turns_and_what_cannot_be_used(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "a b c"}, {"from": "gpt", "value": "d"}]
    rows = [
        ("a", {"png": png(1), "image2.png": png(2, 40), "json": json.dumps({"conversations": talk}).encode()}),
        (
            "b",
            {"png": png(3), "json": b'{"caption": "one two three", "qa": [["q", "yes", "k"], ["q", "not so", "k"]]}'},
        ),
        ("c", {"txt": b"one two three four"}),
        ("d", {"png": b"junk", "txt": b"x"}),
    ]
    (shard,) = write_shards(rows, tmp_path, "s")
    result = stats(str(shard), tokens=lambda text: len(text.split()), thumbnails=3)
    assert (result.samples, result.unusable, result.reasons) == (4, 1, {"undecodable_image": 1})
    assert result.images == {"0": 1, "1": 2, "2": 1}
    assert result.longer_side == {"9-16": 2, "17-32": 0, "33-64": 1}
    assert result.caption_lengths == {"3-4": 2}
    assert result.caption_tokens == {"3-4": 2}
    assert result.answer_tokens == {"2": 2, "3-4": 2}
    assert result.turns == {"3-4": 1}
    assert [name.rpartition(": ")[2] for name, _ in result.thumbnails] == ["a", "b"]
    assert "thumbnails" not in result.counts()


@pytest.mark.parametrize(
    ("values", "expected"),
    [({}, {}), ({0: 3}, {"0": 3}), ({1: 1, 2: 1, 5: 4}, {"1": 1, "2": 1, "3-4": 0, "5-8": 4}), ({16: 1}, {"9-16": 1})],
)
def test_bins_of_histograms_double(values: dict[int, int], expected: dict[str, int]) -> None:
    assert histogram(values) == expected


def test_texts_hold_captions_questions_and_answers(make_shards: Make) -> None:
    texts = Counter(texts_of(str(make_shards(2)[0])))
    for text in ("thing 0", "a thing called 1", "What is it?", "yes", "Describe this image.", "c0"):
        assert texts[text] >= 1


def write(path: Path, data: bytes | str | object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, (list, dict)):
        data = json.dumps(data)
    path.write_bytes(data.encode() if isinstance(data, str) else data)  # type: ignore[arg-type, union-attr]


def test_images_with_texts_beside_them_are_imported(tmp_path: Path) -> None:
    write(tmp_path / "b.v1.PNG", png(1))
    write(tmp_path / "b.v1.txt", "two")
    write(tmp_path / "sub" / "a.png", png(2))
    write(tmp_path / "sub" / "a.json", {"caption": "one"})
    rows = dict(open_rows(tmp_path))
    assert rows == {
        "b.v1": {"png": png(1), "txt": b"two"},
        "sub/a": {"png": png(2), "json": b'{"caption": "one"}'},
    }
    assert len(write_shards(rows.items(), tmp_path / "out", "s")) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.json", {"x/a.png": "red", "b.png": "blue"}),
        ("captions.json", [{"image": "x/a.png", "caption": "red"}, {"file_name": "./b.png", "caption": "blue"}]),
        ("metadata.jsonl", '{"file_name": "x/a.png", "text": "red"}\n{"file_name": "b.png", "text": "blue"}\n'),
        ("captions.txt", "x/a.png\tred\nb.png\tblue\n"),
        ("captions.tsv", "x/a.png\tred\nb.png\tblue\n"),
        ("metadata.csv", 'file_name,text\nx/a.png,red\nb.png,"blue"\n'),
        ("captions.csv", "\ufeffimage,caption,source\nx/a.png,red,web\n./b.png,blue,\n"),
    ],
)
def test_tables_of_captions_are_imported(tmp_path: Path, name: str, content: object) -> None:
    write(tmp_path / "x" / "a.png", png(1))
    write(tmp_path / "b.png", png(2))
    write(tmp_path / name, content)
    rows = {key: json.loads(m["json"])["caption"] for key, m in open_rows(tmp_path)}
    assert rows == {"x/a": "red", "b": "blue"}


def test_class_folders_are_imported(tmp_path: Path) -> None:
    write(tmp_path / "red_fox" / "1.png", png(1))
    write(tmp_path / "cat" / "1.png", png(2))
    rows = dict(open_rows(tmp_path))
    assert {k: m["cls"] for k, m in rows.items()} == {"cat/1": b"0", "red_fox/1": b"1"}
    assert json.loads(rows["red_fox/1"]["json"]) == {"caption": "red fox", "concept": "red_fox"}


def test_llava_files_are_imported_unchanged(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a fox"}]
    write(tmp_path / "im" / "a.png", png(1))
    entries = [{"id": "x 1", "image": "a.png", "conversations": turns}, {"id": "x 1", "conversations": turns}]
    write(tmp_path / "data.json", entries)
    rows = list(open_rows(tmp_path / "data.json", extra=Extra(images=tmp_path / "im")))
    assert [key for key, _ in rows] == ["x_1", "entry_000000001"]
    assert rows[0][1]["png"] == png(1)
    assert json.loads(rows[0][1]["json"])["conversations"] == turns


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([{"image": "../secret.png", "conversations": []}], "leads out"),
        ([{"image": "/etc/passwd.png", "conversations": []}], "leads out"),
        ([{"image": "gone.png", "conversations": []}], "cannot be read"),
        ([{"image": "a.exe", "conversations": []}], "known kind"),
        ([{"id": 3}], "no list 'conversations'"),
        ({"a": 1}, "expected a list"),
        ("{", "is not JSON"),
    ],
)
def test_bad_llava_files_are_refused(tmp_path: Path, content: object, word: str) -> None:
    write(tmp_path / "secret.png", png(1))
    write(tmp_path / "in" / "data.json", content)
    with pytest.raises((ConfigError, SampleError), match=word):
        list(open_rows(tmp_path / "in" / "data.json"))


def test_folders_of_nothing_and_unknown_kinds_are_refused(tmp_path: Path) -> None:
    for source, kind, word in ((tmp_path, "auto", "found neither"), (tmp_path / "x", "auto", "expected a folder")):
        with pytest.raises(ConfigError, match=word):
            open_rows(source, kind)
    with pytest.raises(ConfigError, match="expected auto"):
        open_rows(tmp_path, "zip")
    with pytest.raises(ConfigError, match="no images"):
        open_rows(tmp_path, "captions")
