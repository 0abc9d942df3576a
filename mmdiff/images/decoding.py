"""Pictures in: safe decoding to RGB, and pixels for the networks.

Every picture of the house comes in through ``decode`` or ``open_image``. Colour profiles (ICC) are ignored: the stored
numbers are taken as sRGB, as the published models' own loaders do. Random augmentation does not live here.
"""

from __future__ import annotations

import io
import math
import os
import struct
import urllib.error
import urllib.parse
import urllib.request
import warnings
from dataclasses import dataclass
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdiff.errors import ConfigError, SampleError, redact

__all__ = [
    "DEFAULT_LIMITS",
    "WHITE",
    "Fit",
    "ImageInput",
    "Limits",
    "decode",
    "open_image",
    "redact",
    "to_pixels",
    "to_uint8",
]

Fit = Literal["square", "crop", "pad"]
ImageInput = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
"""What ``open_image`` takes: a path, an https URL, encoded bytes, a PIL image, a uint8 array, or a tensor [3, H, W]."""

WHITE = (255, 255, 255)
URL_TIMEOUT_SECONDS = 30.0
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a picture may cost before anything is decoded."""

    max_bytes: int = 64 * 2**20
    """Encoded bytes."""
    max_pixels: int = 64_000_000
    """Width times height, read from the header before any pixel is decoded."""
    max_side: int = 32_768
    """Longer side in pixels."""
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
    """Pillow's names of the decoders that may run; the other 38 (EPS runs a program) never do."""


DEFAULT_LIMITS = Limits()


def decode(data: bytes, *, limits: Limits = DEFAULT_LIMITS, mode: Literal["RGB", "RGBA"] = "RGB") -> Image.Image:
    """Decode an encoded picture; nothing but a ``SampleError`` leaves this function.

    The first frame only, turned as its EXIF orientation says. 16-bit samples are scaled to 8 bits, CMYK is converted.

    Args:
        data: A whole JPEG, PNG, WebP, GIF or BMP file.
        limits: Size limits, checked against the header before decoding, and allowed formats.
        mode: ``"RGB"`` lays transparency over white; ``"RGBA"`` keeps it.

    Returns:
        A loaded image of that mode.

    Raises:
        SampleError: Reason ``"image_too_large"``, ``"empty_image"`` or ``"undecodable_image"`` (damaged, truncated or
            of another format).
    """
    if len(data) > limits.max_bytes:
        raise SampleError(
            "image_too_large",
            f"the encoded image has {len(data):,} bytes, limit {limits.max_bytes:,}; shrink it or raise the limit",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large pictures; our own limit decides
            with Image.open(io.BytesIO(data), formats=limits.formats) as image:
                _check_size(image.width, image.height, limits)
                image.load()
                return _normalise(image, mode)
    except SampleError:
        raise
    except Image.DecompressionBombError as error:
        raise SampleError("image_too_large", f"{error}; the limit here is {limits.max_pixels:,} pixels") from error
    except Exception as error:
        # Decoders fail in dozens of ways on damaged bytes; each one is this sample's fault and none may escape.
        raise SampleError(
            "undecodable_image",
            f"the image cannot be decoded ({type(error).__name__}: {error}); "
            f"{len(data):,} bytes, allowed formats are {', '.join(limits.formats)}",
        ) from error


def open_image(
    image: ImageInput, *, limits: Limits = DEFAULT_LIMITS, value_range: tuple[float, float] = (-1.0, 1.0)
) -> Image.Image:
    """Any picture a user may hand in, as a loaded RGB image.

    Args:
        image: A path, an ``https://`` URL, encoded bytes, a PIL image, a uint8 array [H, W], [H, W, 1 or 3], or a
            tensor [3, H, W]: uint8, or floating with values in ``value_range``.
        limits: Size limits, the same for every kind of input.
        value_range: Black and white of a floating tensor; the house's pixels are in [-1, 1].

    Returns:
        The image, transparency laid over white.

    Raises:
        ConfigError: No such file, another URL scheme, or a type, shape, dtype or value range that is not taken.
        SampleError: The picture is too large, has no area, or cannot be decoded.
    """
    if isinstance(image, Image.Image):
        return _from_pil(image, limits)
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(bytes(image), limits=limits)
    if isinstance(image, np.ndarray):
        return _from_array(image, limits)
    if isinstance(image, Tensor):
        return _from_tensor(image, limits, value_range)
    if isinstance(image, str | os.PathLike):
        return _from_name(os.fspath(image), limits)
    raise ConfigError(
        f"an image of type {type(image).__name__} is not taken; give a path, an https URL, bytes, a PIL image, "
        "a uint8 array [H, W, 3] or a tensor [3, H, W]"
    )


def to_pixels(image: ImageInput, size: int, fit: Fit = "square") -> Tensor:
    """The picture as the networks want it, resized with Pillow's antialiased bicubic filter.

    Args:
        image: Anything ``open_image`` takes.
        size: Side of the result in pixels, at least 1.
        fit: ``"square"`` squeezes to a square, ``"crop"`` takes the largest centred square, ``"pad"`` keeps everything
            and fills the rest with white.

    Returns:
        float32 [3, size, size] in [-1, 1].
    """
    if size < 1:
        raise ConfigError(f"size must be at least 1 pixel, got {size}")
    rgb = image if isinstance(image, Image.Image) and image.mode == "RGB" else open_image(image)
    array = np.asarray(_fitted(rgb, size, fit), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().div_(127.5).sub_(1.0)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels as bytes: rounded to nearest, values beyond [-1, 1] clamped.

    Args:
        pixels: Floating [B, 3, H, W] in [-1, 1].

    Returns:
        uint8 [B, H, W, 3] on the same device.

    Raises:
        ValueError: Wrong shape, or values that are not finite.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(f"pixels must be floating [B, 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}")
    if not bool(torch.isfinite(pixels).all()):
        raise ValueError("pixels hold values that are not finite; the network that made them has diverged")
    return pixels.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _from_name(name: str | bytes, limits: Limits) -> Image.Image:
    """The picture at a path or URL; what is wrong with it is said with its name."""
    remote = isinstance(name, str) and "://" in name
    path = Path(os.fsdecode(name))
    data = _download(str(name), limits) if remote else _read_file(path, limits)
    try:
        return decode(data, limits=limits)
    except SampleError as error:
        raise SampleError(error.reason, f"{redact(str(name)) if remote else path}: {error}") from error


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise SampleError("empty_image", f"the image is {width} x {height}: it has no pixels")
    if width > limits.max_side or height > limits.max_side or width * height > limits.max_pixels:
        raise SampleError(
            "image_too_large",
            f"the image is {width:,} x {height:,} = {width * height:,} pixels, limits are {limits.max_pixels:,} "
            f"pixels and {limits.max_side:,} per side; shrink it or raise the limit",
        )


def _normalise(image: Image.Image, mode: str) -> Image.Image:
    """Turn upright, scale deep samples, resolve palettes and transparency; always a new image."""
    operation = _ORIENTATIONS.get(_orientation(image))
    image = _eight_bit(image)
    if operation is not None:
        image = image.transpose(operation)
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if mode == "RGB" and not transparent:
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    rgba = image.copy() if image.mode == "RGBA" else image.convert("RGBA")
    if mode == "RGBA":
        return rgba
    white = Image.new("RGBA", rgba.size, (*WHITE, 255))
    white.alpha_composite(rgba)
    return white.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
        return int(value) if isinstance(value, int) else 1
    except (OSError, ValueError, TypeError, SyntaxError, LookupError, ArithmeticError, struct.error):
        return 1  # a damaged EXIF block says nothing about the pixels: they are used as stored


def _eight_bit(image: Image.Image) -> Image.Image:
    """Deep grey scaled to L (Pillow's own conversion clips at 255); everything else as it is."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    if image.mode == "F":
        raise SampleError("undecodable_image", "floating grey images have no defined white; convert them to 16 bit")
    deep = np.asarray(image, dtype=np.int64)
    if deep.size and (deep.min() < 0 or deep.max() > 65535):
        raise SampleError(
            "undecodable_image", f"32-bit grey values from {deep.min():.0f} to {deep.max():.0f}, want 0 to 65535"
        )
    grey = Image.fromarray(np.rint(deep / 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)))
    return grey


def _from_pil(image: Image.Image, limits: Limits) -> Image.Image:
    _check_size(image.width, image.height, limits)
    try:
        image.load()
        return _normalise(image, "RGB")
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(
            "undecodable_image", f"the {image.mode} image cannot be used ({type(error).__name__}: {error})"
        ) from error


def _from_array(array: np.ndarray, limits: Limits) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ConfigError(
            f"an image array must be uint8 [H, W], [H, W, 3] or [H, W, 4], got {array.dtype} {array.shape}; "
            "scale floating values to 0..255 first, or give a tensor [3, H, W]"
        )
    _check_size(array.shape[1], array.shape[0], limits)
    return _normalise(Image.fromarray(np.ascontiguousarray(array)), "RGB")


def _from_tensor(tensor: Tensor, limits: Limits, value_range: tuple[float, float]) -> Image.Image:
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ConfigError(
            f"an image tensor must be [3, H, W], got {tuple(tensor.shape)}; a batch is a list of such tensors"
        )
    _check_size(tensor.shape[2], tensor.shape[1], limits)
    tensor = tensor.detach().to("cpu")
    if tensor.dtype == torch.uint8:
        return Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())
    if not tensor.is_floating_point():
        raise ConfigError(f"an image tensor must be uint8 or floating, got {tensor.dtype}")
    low, high = value_range
    values = tensor.to(torch.float32)
    least, most = float(values.min()), float(values.max())
    slack = 0.01 * (high - low)  # bicubic resizing overshoots a little
    if not (math.isfinite(least) and math.isfinite(most)) or least < low - slack or most > high + slack:
        raise ConfigError(
            f"a floating image tensor must have values in [{low:g}, {high:g}], got {least:g} to {most:g}; "
            "give a uint8 tensor, or pass value_range"
        )
    bytes_ = ((values - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(bytes_.permute(1, 2, 0).contiguous().numpy())


def _read_file(path: Path, limits: Limits) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the image cannot be read ({getattr(error, 'strerror', None) or error})") from error


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to https: a server must not lead the program to other schemes."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """The next request, or a refusal."""
        if urllib.parse.urlsplit(newurl).scheme != "https":
            raise ConfigError(f"{redact(req.full_url)} redirects to {redact(newurl)}, which is not https; refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # only these handlers: no file, ftp, data or plain http
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _HttpsOnly(),
    ):
        opener.add_handler(handler)
    return opener


def _download(url: str, limits: Limits) -> bytes:
    scheme = urllib.parse.urlsplit(url).scheme.lower()
    if scheme != "https":
        raise ConfigError(
            f"{redact(url)}: images are fetched by https only, not {scheme or 'no scheme'}; download it first"
        )
    try:
        with _opener().open(url, timeout=URL_TIMEOUT_SECONDS) as response:
            return response.read(limits.max_bytes + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(f"{redact(url)}: the image cannot be fetched ({reason})") from error


def _fitted(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    width, height = image.size
    if fit == "square" or width == height:
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if fit == "pad":
        scale = size / max(width, height)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        canvas = Image.new("RGB", (size, size), WHITE)
        canvas.paste(image.resize(inner, Image.Resampling.BICUBIC), ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return canvas
    raise ConfigError(f"fit must be 'square', 'crop' or 'pad', got {fit!r}")
