"""Packing from every kind of source, with any number of processes, interrupted and not."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.importers import Decoded, Extra, Rows, detect, open_rows
from data_pipelines.pack import pack, write_shards
from data_pipelines.parallel import run_parts
from data_pipelines.reader import iter_samples
from data_pipelines.sets import dedup, reshard, split
from mmdiff.errors import ConfigError, SampleError, ShardError

from .conftest import png

Make = Callable[..., list[Path]]


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, (list, dict)):
        data = json.dumps(data)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def infos(rows: Rows) -> dict[str, dict[str, Any]]:
    return {key: json.loads(found["json"]) for key, found in rows}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve pictures with texts."""
    for i in range(12):
        write(tmp_path / "images" / f"v1.{i:02d}.png", png(i))
        write(tmp_path / "images" / f"v1.{i:02d}.txt", f"picture {i}")
    return tmp_path / "images"


def test_pictures_alone_are_packed_when_asked_for(images: Path, tmp_path: Path) -> None:
    for text in images.glob("*.txt"):
        text.unlink()
    with pytest.raises(ConfigError, match="add --kind images"):
        open_rows(images)
    report = pack(open_rows(images, "images"), tmp_path / "s")
    samples = [s for s, _ in iter_samples(str(report.shards[0])) if s is not None]
    assert [(s.key, dict(s.members)) for s in samples] == [(f"v1.{i:02d}", {"png": png(i)}) for i in range(12)]


def test_pictures_that_cannot_be_decoded_are_found_while_packing_if_asked_for(images: Path, tmp_path: Path) -> None:
    (images / "v1.03.png").write_bytes(b"<html>404</html>")
    (images / "v1.07.png").write_bytes(png(7)[:60])
    assert pack(open_rows(images), tmp_path / "all").samples == 12
    rows = Decoded(open_rows(images))
    with pytest.raises(SampleError, match=r"v1\.03\.png"):
        pack(rows, tmp_path / "stops")
    reports = [pack(rows, tmp_path / f"good{n}", workers=n, skip_bad=True) for n in (1, 2)]
    assert contents(tmp_path / "good1") == contents(tmp_path / "good2")
    assert {(r.samples, sum(r.skipped.values())) for r in reports} == {(10, 2)}


def test_llava_entries_with_several_images_and_turns_come_through(tmp_path: Path) -> None:
    talk = turns("<image>\n<image>\nwhich is red?", "the first", "sure?", "yes")
    entries = [
        {"id": "two", "image": ["a.png", "sub/b.jpg"], "conversations": talk},
        {"id": "none", "conversations": turns("hi", "hello")},
    ]
    write(tmp_path / "im" / "a.png", png(1))
    write(tmp_path / "im" / "sub" / "b.jpg", b"jpeg bytes")
    for name, content in (("d.json", entries), ("d.jsonl", "\n".join(map(json.dumps, entries)))):
        report = pack(
            open_rows(write(tmp_path / name, content), extra=Extra(images=tmp_path / "im")), tmp_path / name[2:]
        )
        two, none = [s for s, _ in iter_samples(str(report.shards[0])) if s is not None]
        assert two.images() == [png(1), b"jpeg bytes"]
        assert set(two.members) == {"png", "image2.jpg", "json"}
        assert two.info() == {"id": "two", "conversations": talk}
        assert set(none.members) == {"json"}


def test_coco_captions_are_gathered_by_image(tmp_path: Path) -> None:
    tree = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}, {"id": 11, "file_name": "c.jpg"}],
        "annotations": [
            {"image_id": 9, "id": 1, "caption": " a dog "},
            {"image_id": 7, "id": 2, "caption": "a cat"},
            {"image_id": 9, "id": 3, "caption": "two dogs"},
        ],
    }
    file = write(tmp_path / "captions_val2017.json", tree)
    for name in "abc":
        write(tmp_path / "val2017" / f"{name}.jpg", name.encode())
    assert detect(file) == "coco"
    rows = open_rows(file, extra=Extra(images=tmp_path / "val2017"))
    assert infos(rows) == {
        "a": {"caption": "a cat", "captions": ["a cat"], "image_id": 7},
        "b": {"caption": "a dog", "captions": ["a dog", "two dogs"], "image_id": 9},
    }
    assert rows[1][1]["jpg"] == b"b"


def test_vqa_questions_are_gathered_by_image_with_their_answers(tmp_path: Path) -> None:
    asked = {
        "data_subtype": "train2014",
        "questions": [
            {"question_id": 90, "image_id": 9, "question": "How many?"},
            {"question_id": 91, "image_id": 9, "question": "What color?"},
            {"question_id": 70, "image_id": 7, "question": "Is it?"},
        ],
    }
    told = [
        {"question_id": 90, "multiple_choice_answer": "2", "answer_type": "number", "answers": [{"answer": "2"}] * 3},
        {"question_id": 91, "answers": [{"answer": "red"}, {"answer": "blue"}, {"answer": "red"}]},
        {"question_id": 70, "multiple_choice_answer": "yes", "answer_type": "yes/no"},
    ]
    questions, answers = write(tmp_path / "q.json", asked), write(tmp_path / "a.json", {"annotations": told})
    write(tmp_path / "im" / "COCO_train2014_000000000009.jpg", b"nine")
    write(tmp_path / "im" / "000000000007.jpg", b"seven")
    assert detect(questions) == "vqa"
    rows = open_rows(questions, extra=Extra(images=tmp_path / "im", answers=answers))
    assert [m["jpg"] for _, m in rows] == [b"seven", b"nine"]
    assert infos(rows)["000000000009"]["qa"] == [["How many?", "2", "number"], ["What color?", "red", ""]]
    assert infos(rows)["000000000009"]["answers"][1] == ["red", "blue", "red"]
    with pytest.raises(ConfigError, match="--answers"):
        open_rows(questions)
    with pytest.raises(ConfigError, match="no answer to question 91"):
        open_rows(questions, extra=Extra(answers=write(tmp_path / "b.json", {"annotations": told[:1]})))


@pytest.mark.parametrize(
    ("kind", "content", "word"),
    [
        ("coco", {"images": []}, "list 'annotations'"),
        ("coco", {"images": [{"id": 1}], "annotations": []}, "has no file_name"),
        ("coco", {"images": [], "annotations": []}, "no image has a caption"),
        (
            "coco",
            {"images": [{"id": 1, "file_name": "../x.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]},
            "leads out",
        ),
        ("llava", [{"image": [3], "conversations": []}], "expected a file name"),
        ("table", "junk", "cannot be read as a table|pyarrow is needed"),
    ],
)
def test_files_of_another_form_are_refused_in_words(tmp_path: Path, kind: str, content: object, word: str) -> None:
    name = "x.parquet" if kind == "table" else "x.json"
    with pytest.raises(Exception, match=word) as caught:
        open_rows(write(tmp_path / "d" / name, content), kind)
    assert getattr(caught.value, "exit_code", None) == 2


def tar(path: Path, **entries: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, data in entries.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def test_shards_of_others_are_read_under_our_names(tmp_path: Path) -> None:
    one = tar(
        tmp_path / "s" / "00000.tar", a__jpg=b"1", a__caption=b"a cat", b__png=b"2", b__text=b"a dog", b__pkl=b"x"
    )
    two = tar(tmp_path / "s" / "00001.tar", a__jpg=b"3", a__txt=b"a fox", a__json=b'{"width": 3}')
    assert detect(tmp_path / "s") == "shards"
    rows = dict(open_rows(tmp_path / "s"))
    assert rows == {
        "00000/a": {"jpg": b"1", "txt": b"a cat"},
        "00000/b": {"png": b"2", "txt": b"a dog"},
        "00001/a": {"jpg": b"3", "txt": b"a fox", "json": b'{"width": 3}'},
    }
    captions = write(tmp_path / "recaptioned.json", {"a": "a red fox on snow"})
    (again,) = open_rows(str(two), extra=Extra(captions=captions))
    assert json.loads(again[1]["json"]) == {"caption": "a red fox on snow", "width": 3}
    assert "txt" not in again[1]
    with pytest.raises(ConfigError, match="none of its 1 keys"):
        open_rows(str(one), extra=Extra(captions=write(tmp_path / "other.json", {"zzz": "x"})))
    # They can also be trained on as they are.
    (sample, _), *_ = iter_samples(str(one))
    assert sample is not None
    assert sample.text() == "a cat"


def arrow_image(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}


def table_rows(count: int) -> dict[str, list[Any]]:
    return {
        "image": [arrow_image(png(i)) for i in range(count)],
        "image_1": [arrow_image(png(i + 100)) if i % 2 else None for i in range(count)],
        "text": [f"thing {i}" for i in range(count)],
        "label": [i % 2 for i in range(count)],
        "question": ["what?"] * count,
        "answer": [f"answer {i}" for i in range(count)],
        "messages": [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]] * count,
        "box": [[1.0, 2.0]] * count,
    }


@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
def test_tables_of_hugging_face_datasets_become_samples(tmp_path: Path, form: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "image": {"_type": "Image"}}
    told = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    for part, count in enumerate((5, 3)):
        table = arrow.Table.from_pydict(table_rows(count)).replace_schema_metadata(told)
        folder = tmp_path / "set" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        if form == "parquet":
            pyarrow.parquet.write_table(table, folder / f"train-0000{part}-of-00002.parquet", row_group_size=2)
            continue
        opened = arrow.ipc.new_stream if form == "stream" else arrow.ipc.new_file
        with opened(str(folder / f"data-0000{part}-of-00002.arrow"), table.schema) as out:
            out.write_table(table, max_chunksize=2)
    assert detect(tmp_path / "set") == "table"
    rows = open_rows(tmp_path / "set")
    assert len(rows) == 8
    assert len({key for key, _ in rows}) == 8
    key, found = rows[3]
    assert key.endswith("00000003")
    assert (found["png"], found["image2.png"], found["cls"]) == (png(3), png(103), b"1")
    info = json.loads(found["json"])
    assert (info["caption"], info["concept"], info["box"]) == ("thing 3", "dog", [1.0, 2.0])
    assert info["qa"] == [["what?", "answer 3", ""]]
    assert info["conversations"] == [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    assert rows[6][1]["png"] == png(1)
    one, two = (pack(rows, tmp_path / f"out{n}", samples_per_shard=3, workers=n) for n in (1, 2))
    assert one.samples == two.samples == 8
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_any_number_of_processes_writes_the_same_bytes(images: Path, tmp_path: Path, workers: int) -> None:
    ticks: list[int] = []
    pack(open_rows(images), tmp_path / "one", samples_per_shard=5)
    report = pack(open_rows(images), tmp_path / "many", samples_per_shard=5, workers=workers, tick=ticks.append)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert (report.samples, len(report.shards), sum(ticks)) == (12, 3, 12)


def test_bad_samples_stop_packing_or_are_counted_by_reason(images: Path, tmp_path: Path) -> None:
    entries = [{"image": f"v1.{i:02d}.png", "conversations": turns("x", "y")} for i in range(12)]
    entries[3]["image"], entries[8]["image"] = "gone.png", "v1.08.exe"
    file = write(tmp_path / "d.json", entries)
    rows = open_rows(file, extra=Extra(images=images))
    for workers in (1, 2):
        with pytest.raises(SampleError, match=r"gone\.png: cannot be read|known kind"):
            pack(rows, tmp_path / f"s{workers}", samples_per_shard=4, workers=workers)
    reports = [
        pack(rows, tmp_path / f"t{n}", samples_per_shard=4, workers=n, skip_bad=True, overwrite=True) for n in (1, 2)
    ]
    assert all(dict(r.skipped) == {"missing_file": 1, "not_an_image": 1} and r.samples == 10 for r in reports)
    assert contents(tmp_path / "t1") == contents(tmp_path / "t2")


RUN = """
import sys
from data_pipelines.importers import open_rows
from data_pipelines.pack import pack
pack(open_rows(sys.argv[1]), sys.argv[2], samples_per_shard=2, workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("whom", ["all", "parent"])
def test_packing_goes_on_after_a_kill_and_ends_with_the_same_bytes(tmp_path: Path, repository: Path, whom: str) -> None:
    for i in range(120):
        write(tmp_path / "images" / f"{i:04d}.png", png(i))
        write(tmp_path / "images" / f"{i:04d}.txt", f"picture {i}")
    whole = pack(open_rows(tmp_path / "images"), tmp_path / "whole", samples_per_shard=2)
    assert whole.resumed == 0
    out = tmp_path / "out"
    command = [sys.executable, "-c", RUN, str(tmp_path / "images"), str(out), "2"]
    running = subprocess.Popen(command, cwd=repository, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.idx.json"))) < 7 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    if whom == "all":
        os.killpg(running.pid, signal.SIGKILL)
    else:
        running.kill()
    running.wait()
    before = len(list(out.glob("*.idx.json")))
    (out / "shard-00059.tar.tmp-1").write_bytes(b"half")
    report = pack(open_rows(tmp_path / "images"), out, samples_per_shard=2, workers=1)
    assert 7 <= before <= report.resumed <= 60
    assert contents(out) == contents(tmp_path / "whole")


def test_an_interrupted_overwrite_never_keeps_a_shard_of_the_old_plan(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    pack(open_rows(images), out, samples_per_shard=5)
    other = write(tmp_path / "more" / "a.png", png(99)).parent
    write(other / "a.txt", "a")
    for i in range(11):
        write(other / f"b{i}.png", png(i))

    class Breaks(Rows):
        def __init__(self, rows: Rows) -> None:
            super().__init__([key for key, _ in rows], rows._origin)
            self.rows = rows

        def members(self, i: int) -> Any:
            if i == 7:
                raise KeyboardInterrupt
            return self.rows.members(i)

    with pytest.raises(KeyboardInterrupt):
        pack(Breaks(open_rows(other)), out, samples_per_shard=5, overwrite=True)
    report = pack(open_rows(other), out, samples_per_shard=5)
    assert report.resumed == 1
    pack(open_rows(other), tmp_path / "clean", samples_per_shard=5)
    assert contents(out) == contents(tmp_path / "clean")


def test_a_helper_that_dies_is_named(images: Path) -> None:
    def dies(part: int, tick: object) -> None:
        os._exit(9)

    with pytest.raises(ShardError, match="exit code 9"):
        list(run_parts(dies, [0, 1, 2], 2))


def test_equal_keys_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path / "i" / "a.png", png(1))
    write(tmp_path / "i" / "a.jpg", b"x")
    write(tmp_path / "i" / "a.txt", "x")
    with pytest.raises(ConfigError, match="'a' occurs twice"):
        pack(open_rows(tmp_path / "i"), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    return {s.key: dict(s.members) for s, _ in iter_samples(str(folder)) if s is not None}


def test_resharding_keeps_every_sample(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards(25, 10)
    report = reshard([str(s) for s in shards], tmp_path / "new", 7)
    assert [len(list(iter_samples(str(s)))) for s in report.shards] == [7, 7, 7, 4]
    assert list(samples_of(tmp_path / "new")) == list(samples_of(shards[0].parent))
    shuffled = reshard([str(s) for s in shards], tmp_path / "mixed", 7, shuffle=3, workers=2)
    assert shuffled.samples == 25
    assert samples_of(tmp_path / "mixed") == samples_of(shards[0].parent)
    assert list(samples_of(tmp_path / "mixed")) != list(samples_of(shards[0].parent))
    with pytest.raises(ConfigError, match="another folder"):
        reshard([str(s) for s in shards], shards[0].parent, 7)


def photo(seed: int, side: int = 32) -> Image.Image:
    small = np.random.RandomState(seed).randint(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def doubles(tmp_path: Path) -> Path:
    """Forty photographs, every fourth of them three times: as it is, in another lossless file, and as a JPEG."""
    rows = []
    for i in range(40):
        rows.append((f"{i:03d}", {"png": saved(photo(i)), "txt": b"a"}))
        if i % 4 == 0:
            rows.append((f"{i:03d}_copy", {"png": saved(photo(i), compress_level=1), "txt": b"b"}))
            rows.append((f"{i:03d}_near", {"jpg": saved(photo(i), "JPEG", quality=90), "txt": b"c"}))
    rows.append(("text", {"txt": b"no picture"}))
    rows.append(("text_copy", {"txt": b"no picture"}))
    write_shards(rows, tmp_path / "doubles", "d", 9)
    return tmp_path / "doubles"


def test_duplicates_are_found_by_content_and_by_looks(doubles: Path, tmp_path: Path) -> None:
    report = dedup([str(doubles)])
    assert dedup([str(doubles)], workers=2) == report
    assert (report.samples, report.unreadable, report.copies) == (62, 0, 11)
    identical = {tuple(name.partition(".tar: ")[2] for name in group) for group in report.exact}
    assert identical == {(f"{i:03d}", f"{i:03d}_copy") for i in range(0, 40, 4)} | {("text", "text_copy")}
    alike = {tuple(name.partition(".tar: ")[2] for name in group) for group in report.near}
    assert alike == {(f"{i:03d}", f"{i:03d}_near") for i in range(0, 40, 4)}
    assert report.across == 0
    assert "identical: 11 groups, 11 samples" in str(report)


@pytest.mark.parametrize("near", [False, True])
def test_no_picture_is_in_two_parts_of_a_split(doubles: Path, tmp_path: Path, near: bool) -> None:
    shares = {"train": 0.6, "val": 0.2, "test": 0.2}
    report = split([str(doubles)], tmp_path / "parts", shares, seed=1, near=near, workers=2)
    assert sum(part.samples for part in report.parts.values()) == 62
    where = {key: name for name in shares for key in samples_of(tmp_path / "parts" / name)}
    assert len(where) == 62
    assert all(where[key] == where[key.removesuffix("_copy")] for key in where if key.endswith("_copy"))
    together = [where[key] == where[key.removesuffix("_near")] for key in where if key.endswith("_near")]
    assert all(together) if near else not all(together)
    names = [str(tmp_path / "parts" / name) for name in shares]
    assert (dedup(names).across == 0) is near
    again = split([str(doubles)], tmp_path / "again", shares, seed=1, near=near)
    assert all(contents(tmp_path / "parts" / n) == contents(tmp_path / "again" / n) for n in shares)
    assert again.groups == report.groups
    resumed = split([str(doubles)], tmp_path / "again", shares, seed=1, near=near)
    assert [part.resumed for part in resumed.parts.values()] == [1, 1, 1]


def test_where_a_picture_goes_does_not_depend_on_its_name_or_company(doubles: Path, tmp_path: Path) -> None:
    split([str(doubles)], tmp_path / "a", {"train": 0.7, "test": 0.3})
    before = {m["png"]: n for n in ("train", "test") for m in samples_of(tmp_path / "a" / n).values() if "png" in m}
    rows = [(f"other{i}", {"png": saved(photo(i)), "txt": b"a"}) for i in range(30, 70)]
    write_shards(rows, tmp_path / "b", "s")
    split([str(tmp_path / "b")], tmp_path / "c", {"train": 0.7, "test": 0.3})
    after = {m["png"]: n for n in ("train", "test") for m in samples_of(tmp_path / "c" / n).values()}
    assert len(before.keys() & after.keys()) == 10
    assert all(before[data] == after[data] for data in before.keys() & after.keys())


@pytest.mark.parametrize("shares", [{"a": 1.0}, {"a": 0.5, "b": 0.6}, {"a": 1.5, "b": -0.5}])
def test_shares_that_are_none_are_refused(doubles: Path, tmp_path: Path, shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="adding up to 1"):
        split([str(doubles)], tmp_path / "x", shares)


def test_samples_with_pictures_in_common_go_together(tmp_path: Path) -> None:
    # 0-1, 1-2, 2-3: no picture is in all of them, and yet none may be parted from the next.
    rows = [(f"chain{i}", {"png": saved(photo(i)), "image2.png": saved(photo(i + 1)), "txt": b"x"}) for i in range(8)]
    rows += [(f"lone{i}", {"png": saved(photo(100 + i)), "txt": b"x"}) for i in range(20)]
    write_shards(rows, tmp_path / "s", "s")
    report = split([str(tmp_path / "s")], tmp_path / "p", {"train": 0.5, "test": 0.5})
    where = {key: name for name in ("train", "test") for key in samples_of(tmp_path / "p" / name)}
    assert report.groups == 1
    assert len({where[f"chain{i}"] for i in range(8)}) == 1


def test_a_full_disk_is_a_sentence_and_leaves_whole_shards_only(tmp_path, monkeypatch):
    rows = [(f"{i:03d}", {"png": png(i), "cls": b"1"}) for i in range(4)]
    write_shards(rows[:2], tmp_path, "train", 2)
    before = (tmp_path / "train-00000.tar").read_bytes()

    def full(tar: tarfile.TarFile, *given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(ShardError, match=r"train-00000.tar: could not be written \(No space left .* make room"):
        write_shards(rows, tmp_path, "train", 2)
    assert (tmp_path / "train-00000.tar").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train-00000.tar", "train-00000.tar.idx.json"]
