"""Safe decoding, every kind of input, resizing, contact sheets."""

from __future__ import annotations

import io
import random
import resource
import struct
import time
import urllib.request
import zlib
from email.message import Message

import numpy as np
import pytest
import torch
from PIL import Image

from mmdiff.errors import ConfigError, SampleError
from mmdiff.images import Limits, decode, decoding, encode_png, grid, open_image, redact, to_pixels, to_uint8


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def gradient(width: int = 48, height: int = 32) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 5 % 256, y * 7 % 256, (x + y) * 3 % 256], axis=-1).astype(np.uint8))


def png_of_size(width: int, height: int) -> bytes:
    """A valid grey PNG of that size made without ever holding its pixels."""
    rows = zlib.compressobj(9)
    block = bytes((width + 1) * 64)
    body = b"".join(rows.compress(block) for _ in range(height // 64)) + rows.compress(
        bytes((width + 1) * (height % 64))
    )

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body + rows.flush()) + chunk(b"IEND", b"")


def reason(data: bytes, **options: object) -> str:
    with pytest.raises(SampleError) as caught:
        decode(data, **options)  # type: ignore[arg-type]
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "JPEG"])
def test_every_allowed_format_decodes_to_rgb(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    image = decode(encoded(gradient(), kind, **options))
    assert image.mode == "RGB"
    assert image.size == (48, 32)
    if kind in ("PNG", "WEBP", "BMP"):
        assert np.array_equal(np.asarray(image), np.asarray(gradient()))


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "EPS", "PDF", "TGA"])
def test_formats_outside_the_list_are_refused(kind: str) -> None:
    assert reason(encoded(gradient(), kind)) == "undecodable_image"


def test_r08_7000_fuzzed_images_raise_nothing_but_sample_errors() -> None:
    draw = random.Random(0)
    small = gradient(24, 16)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [
        encoded(small),
        encoded(small.convert("P")),
        encoded(small.convert("RGBA")),
        encoded(small, "JPEG", exif=exif),
        encoded(small.convert("CMYK"), "JPEG"),
        encoded(small, "WEBP"),
        encoded(small, "GIF", save_all=True, append_images=[small.rotate(90)]),
        encoded(small, "BMP"),
        encoded(Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24) * 170)),
    ]
    decoded = refused = 0
    slowest = 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(7000):
        data = bytearray(seeds[number % len(seeds)])
        for _ in range(draw.choice((1, 1, 2, 4, 16))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)) :]
        started = time.perf_counter()
        try:
            assert decode(bytes(data)).mode == "RGB"
            decoded += 1
        except SampleError:
            refused += 1
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 400 << 10  # kilobytes
    assert decoded > 1000
    assert refused > 1000


@pytest.mark.parametrize(("width", "height"), [(13_000, 13_000), (40_000, 10), (8_001, 8_000)])
def test_r09_bombs_are_refused_by_their_header(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    data = png_of_size(width, height)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    assert reason(data) == "image_too_large"


def test_encoded_bytes_are_capped() -> None:
    assert reason(encoded(gradient()), limits=Limits(max_bytes=100)) == "image_too_large"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_images_are_undecodable(kind: str) -> None:
    data = encoded(gradient(200, 200), kind)
    assert reason(data[: len(data) // 2]) == "undecodable_image"
    assert reason(b"") == "undecodable_image"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, :8, 0], upright[:4, :, 1] = 255, 255
    # How a camera stores the upright picture under each orientation: the inverse of what a viewer does.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(data)), upright)


def test_damaged_exif_leaves_the_pixels_as_stored() -> None:
    data = encoded(gradient(), "PNG", exif=b"Exif\x00\x00rubbish that is no TIFF")
    assert np.array_equal(np.asarray(decode(data)), np.asarray(gradient()))


def test_hidden_colour_under_transparency_becomes_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (0, 0, 255, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    image = decode(encoded(rgba))
    assert image.getpixel((0, 0)) == (0, 0, 255)
    assert image.getpixel((3, 3)) == (255, 255, 255)
    assert image.getpixel((1, 0)) == (127, 127, 127)
    assert decode(encoded(rgba), mode="RGBA").getpixel((3, 3))[3] == 0


def test_palette_grey_and_key_colour_transparency_become_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    assert decode(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(palette, transparency=0)).getpixel((1, 0)) == (0, 255, 0)
    assert decode(encoded(palette, "PNG", transparency=bytes([0, 255]))).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), transparency=(9, 8, 7))).getpixel((0, 0))[0] == 255
    assert decode(encoded(Image.new("L", (1, 1), 9), transparency=9)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 40_000, 65_535]], dtype=np.uint16)
    grey = np.asarray(decode(encoded(Image.fromarray(values))))[0, :, 0]
    assert grey.tolist() == [0, 1, 156, 255]


def test_cmyk_is_converted() -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    red, green, blue = decode(encoded(cyan, "JPEG", quality=95)).getpixel((4, 4))
    assert red < 20
    assert green > 230
    assert blue > 230


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_only_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("blue", "red", "lime")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=10)
    red, green, blue = decode(data).getpixel((4, 4))
    assert blue > 240
    assert red < 15
    assert green < 15


def test_all_inputs_give_the_same_picture(tmp_path) -> None:
    want = np.asarray(gradient())
    data, path = encoded(gradient()), tmp_path / "a b.png"
    path.write_bytes(data)
    tensor = torch.from_numpy(want.copy()).permute(2, 0, 1)
    pixels = tensor.float() / 127.5 - 1
    inputs = (path, str(path), data, bytearray(data), gradient(), want, tensor, pixels, pixels.double())
    for image in inputs:
        assert np.array_equal(np.asarray(open_image(image)), want)
    assert np.array_equal(np.asarray(open_image(tensor / 255, value_range=(0, 1))), want)
    assert np.array_equal(np.asarray(open_image(want[:, :, 0])), np.repeat(want[:, :, :1], 3, axis=2))


def test_open_image_does_not_alias_the_users_image() -> None:
    mine = Image.new("RGB", (2, 2))
    open_image(mine).putpixel((0, 0), (9, 9, 9))
    assert mine.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((4, 4, 5), np.uint8), r"\(4, 4, 5\)"),
        (torch.zeros(1, 3, 4, 4), "batch"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "int64"),
        (torch.full((3, 4, 4), 200.0), "200"),
        (torch.full((3, 4, 4), float("nan")), "nan"),
        ("no/such/file.png", "No such file"),
        ("http://example.org/a.png", "https only"),
        ("file:///etc/passwd", "https only"),
        ("ftp://user:secret@host/a", "https only"),
        (7, "int"),
    ],
)
def test_wrong_inputs_are_refused_with_a_sentence(image: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        open_image(image)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_empty_and_huge_arrays_are_refused() -> None:
    for empty in (np.zeros((0, 4, 3), np.uint8), torch.zeros(3, 4, 0)):
        with pytest.raises(SampleError, match="no pixels"):
            open_image(empty)
    huge = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (10_000, 10_000, 3))
    with pytest.raises(SampleError, match="100,000,000 pixels"):
        open_image(huge)


class _Answer(io.BytesIO):
    def __enter__(self) -> _Answer:
        return self


def test_an_https_picture_is_fetched_within_the_byte_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Opener:
        def open(self, url: str, timeout: float) -> _Answer:
            asked.append((url, timeout))
            return _Answer(encoded(gradient()))

    monkeypatch.setattr(decoding, "_opener", Opener)
    url = "https://user:secret@example.org/a.png?token=1"
    assert open_image(url).size == (48, 32)
    assert asked == [(url, decoding.URL_TIMEOUT_SECONDS)]
    with pytest.raises(SampleError, match="limit 50"):
        open_image(url, limits=Limits(max_bytes=50))
    assert redact(url) == "https://example.org/a.png"


def test_redirects_leave_https_never() -> None:
    handler = decoding._HttpsOnly()
    request = urllib.request.Request("https://example.org/a?token=1")
    for target in ("http://example.org/b", "file:///etc/passwd"):
        with pytest.raises(ConfigError, match="not https"):
            handler.redirect_request(request, io.BytesIO(), 302, "", Message(), target)
    followed = handler.redirect_request(request, io.BytesIO(), 302, "", Message(), "https://other.org/b")
    assert followed is not None
    assert followed.full_url == "https://other.org/b"
    kinds = {type(handler).__name__ for handlers in decoding._opener().handle_open.values() for handler in handlers}
    assert not kinds & {"HTTPHandler", "FileHandler", "FTPHandler", "DataHandler"}


def test_to_pixels_is_pillows_bicubic_in_minus_one_to_one() -> None:
    want = np.asarray(gradient().resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32)
    got = to_pixels(gradient(), 16)
    assert got.shape == (3, 16, 16)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert np.abs((got.permute(1, 2, 0).numpy() + 1) * 127.5 - want).max() < 1e-3
    assert to_pixels(np.full((4, 4, 3), 255, np.uint8), 4).eq(1).all()
    assert to_pixels(np.zeros((4, 4, 3), np.uint8), 4).eq(-1).all()


def test_crop_keeps_the_middle_and_pad_keeps_everything_on_white() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = (255, 0, 0)
    assert to_pixels(wide, 10, "crop").permute(1, 2, 0).eq(torch.tensor([1.0, -1, -1])).all()
    padded = to_pixels(wide, 30, "pad")
    assert padded[:, :10].eq(1).all()
    assert padded[:, 20:].eq(1).all()
    assert padded[0, 10:20, 12:18].gt(0.9).all()
    assert padded[:, 10:20, :8].lt(-0.9).all()
    with pytest.raises(ConfigError, match="'stretch'"):
        to_pixels(wide, 8, "stretch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got 0"):
        to_pixels(wide, 0)


def test_to_uint8_inverts_to_pixels_and_refuses_nan() -> None:
    pixels = to_pixels(gradient(), 32, "crop")[None]
    assert torch.equal(to_pixels(to_uint8(pixels)[0].numpy(), 32)[None], pixels)
    assert to_uint8(torch.tensor([-9.0, 0.0, 9.0]).view(1, 3, 1, 1)).flatten().tolist() == [0, 128, 255]
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))
    with pytest.raises(ValueError, match="int64"):
        to_uint8(torch.zeros(1, 3, 2, 2, dtype=torch.int64))


def test_grid_places_pictures_and_writes_captions() -> None:
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    cells = [Image.new("RGB", (8, 8), color) for color in colors]
    sheet = grid(cells, columns=2, pad=2)
    assert sheet.size == (22, 22)
    assert [sheet.getpixel(at) for at in ((3, 3), (13, 3), (3, 13))] == colors
    assert sheet.getpixel((13, 13)) == (255, 255, 255)
    assert sheet.getpixel((0, 0)) == (255, 255, 255)
    named = grid([Image.new("RGB", (64, 8), "white")] * 2, captions=["a word", "a caption far too long to fit"])
    assert named.height > 20
    assert np.asarray(named).min() < 100
    assert grid(torch.zeros(5, 3, 4, 4)).size == (3 * 6 + 2, 2 * 6 + 2)
    with pytest.raises(ConfigError, match="1 captions"):
        grid(cells, captions=["one"])
    with pytest.raises(ConfigError, match="at least one"):
        grid([])


def test_png_bytes_round_trip_and_repeat() -> None:
    data = encode_png(gradient())
    assert data == encode_png(np.asarray(gradient()))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(gradient()))
