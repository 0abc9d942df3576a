"""Pictures out: contact sheets and PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmdiff.errors import ConfigError
from mmdiff.images.decoding import WHITE, ImageInput, open_image

__all__ = ["encode_png", "grid"]


def grid(
    images: Sequence[ImageInput] | Tensor,
    columns: int | None = None,
    pad: int = 2,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """A contact sheet on white.

    Args:
        images: Pictures, or pixels [B, 3, H, W] in [-1, 1]. Each cell is as large as the largest picture.
        columns: Pictures per row; by default the square root of their number, rounded up.
        pad: White pixels around each cell.
        captions: One text per picture, wrapped into at most three lines below it.

    Returns:
        An RGB image.
    """
    pictures = [open_image(image) for image in images]
    if not pictures:
        raise ConfigError("a grid needs at least one image")
    if captions is not None and len(captions) != len(pictures):
        raise ConfigError(f"{len(pictures)} images and {len(captions)} captions; give one caption per image")
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    lines = [_wrapped(text, width) for text in captions] if captions is not None else [[] for _ in pictures]
    line_height = 12
    cell_width, cell_height = width + pad, height + pad + line_height * max(len(part) for part in lines)
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * cell_width + pad, rows * cell_height + pad), WHITE)
    draw, font = ImageDraw.Draw(sheet), _font()
    for number, picture in enumerate(pictures):
        left, top = pad + number % columns * cell_width, pad + number // columns * cell_height
        sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
        for line, text in enumerate(lines[number]):
            draw.text((left, top + height + line * line_height), text, fill=(0, 0, 0), font=font)
    return sheet


def encode_png(image: ImageInput) -> bytes:
    """The picture as PNG bytes, the same bytes for the same pixels."""
    buffer = io.BytesIO()
    open_image(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=10)


def _wrapped(text: str, width: int, most: int = 3) -> list[str]:
    """The text in lines of at most ``width`` pixels, the last one cut with two dots when there is more."""
    font = _font()
    text = text.encode("latin-1", "replace").decode("latin-1")  # the built-in bitmap font knows no more
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        elif len(lines) == most:
            lines[-1] += ".."
            break
        else:
            lines.append(word)
    for number, line in enumerate(lines):
        while len(line) > 3 and font.getlength(line) > width:
            line = line.rstrip(".")[:-1] + ".."
        lines[number] = line
    return lines
