"""The Python interface: load a checkpoint, then caption, ask, chat, generate and draw.

A top-level list is always a batch and gives a list in the same order. Nothing here knows how decoding works: that is
``mmdiff.sampling``.
"""

from mmdiff.pipelines.base import Checkpoint, Pipeline, load
from mmdiff.pipelines.image import ImageGenerator, ImageOutput
from mmdiff.pipelines.prompts import Video
from mmdiff.pipelines.text import TextGenerator
from mmdiff.pipelines.vision import VisionLanguage

__all__ = [
    "Checkpoint",
    "ImageGenerator",
    "ImageOutput",
    "Pipeline",
    "TextGenerator",
    "Video",
    "VisionLanguage",
    "load",
]
