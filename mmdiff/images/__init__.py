"""Images in and out: safe decoding, crops and their image tokens, contact sheets.

`decoding` turns whatever a user hands in into RGB and pixels; `tiles` cuts a picture of any shape, several pictures or
a video into square crops; `views` says how the features of those crops become image tokens; `sheets` writes.
"""

from mmdiff.images.decoding import (
    Fit,
    ImageInput,
    Limits,
    decode,
    open_image,
    redact,
    to_pixels,
    to_uint8,
)
from mmdiff.images.sheets import encode_png, grid
from mmdiff.images.tiles import Crops, Tiling, crop_sizes, cut, film, sample_frames, to_shape, views_of
from mmdiff.images.views import Flat, Frames, Tiles, View

__all__ = [
    "Crops",
    "Fit",
    "Flat",
    "Frames",
    "ImageInput",
    "Limits",
    "Tiles",
    "Tiling",
    "View",
    "crop_sizes",
    "cut",
    "decode",
    "encode_png",
    "film",
    "grid",
    "open_image",
    "redact",
    "sample_frames",
    "to_pixels",
    "to_shape",
    "to_uint8",
    "views_of",
]
