"""Which colour an object has: its picture cut out, and CLIP's choice between ten sentences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.errors import ConfigError
from mmdiff.rng import generator

from .prompts import COLORS
from .rules import Detection, Options

__all__ = ["ColorClassifier", "class_prompts", "classifier", "crop", "logits_of"]

_SCALE = 100.0


def class_prompts(name: str) -> list[list[str]]:
    """Three sentences for each of the ten colours; the article is always ``a``."""
    return [
        [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object"]
        for color in COLORS
    ]


def classifier(features: Float[Tensor, "K T F"]) -> Float[Tensor, "F K"]:
    """One unit vector per colour: features of its sentences brought to unit length, averaged, and again."""
    mean = torch.nn.functional.normalize(features, dim=-1).mean(dim=1)
    return torch.nn.functional.normalize(mean, dim=-1).T


def logits_of(images: Float[Tensor, "N F"], classes: Float[Tensor, "F K"]) -> Float[Tensor, "N K"]:
    """100 times the cosine of image features and class vectors."""
    return _SCALE * torch.nn.functional.normalize(images, dim=-1) @ classes


def crop(image: Any, detection: Detection, options: Options) -> Any:
    """The picture that CLIP sees of an object.

    Args:
        image: PIL image, RGB.
        detection: The object; outside its mask the picture is replaced, without a mask it stays.
        options: ``bgcolor`` and ``crop`` count.

    Raises:
        ConfigError: The mask has another size than the picture.
    """
    from PIL import Image

    if detection.mask is not None:
        if detection.mask.shape != image.size[::-1]:
            raise ConfigError(f"a mask of {detection.mask.shape} for a picture of {image.size[::-1]}")
        blank = image if options.bgcolor == "original" else Image.new("RGB", image.size, options.bgcolor)
        image = Image.composite(image, blank, Image.fromarray(detection.mask.astype(bool)))
    # Python's round: half to even. What lies outside the picture becomes black.
    return image.crop(tuple(round(float(x)) for x in detection.box)) if options.crop else image


class ColorClassifier:
    """CLIP as a judge of colours; remembers the sentences of a class.

    Args:
        encode_texts: Texts -> features [n, F].
        encode_image: PIL image -> features [1, F], the network's own resize included.
        name: Of the network and its weights, for the record.
    """

    def __init__(
        self, encode_texts: Callable[[list[str]], Tensor], encode_image: Callable[[Any], Tensor], name: str
    ) -> None:
        self.name = name
        self.encode_texts = encode_texts
        self.encode_image = encode_image
        self._vectors = functools.lru_cache(maxsize=128)(self._vectors_of)

    @classmethod
    def open_clip(cls, model: str = "ViT-L-14", pretrained: str = "openai", *, device: str = "cpu") -> ColorClassifier:
        """Any model of open_clip; the official one is ViT-L-14 with OpenAI's weights (a name or a file)."""
        import open_clip

        if model not in open_clip.list_models():
            raise ConfigError(f"CLIP {model!r}: open_clip has no model of that name")
        try:
            net, _, transform = open_clip.create_model_and_transforms(
                model, pretrained=pretrained or None, device=device
            )
        except (RuntimeError, OSError) as e:
            said = (str(e).splitlines() or [""])[0]
            raise ConfigError(
                f"CLIP {model}/{pretrained}: open_clip could not get or read the weights ({said}); give a file, "
                f"as in --clip {model}/PATH"
            ) from e
        net.eval().requires_grad_(False)
        tokenize = open_clip.get_tokenizer(model)

        def image(picture: Any) -> Tensor:
            return net.encode_image(transform(picture)[None].to(device)).float().cpu()

        def texts(sentences: list[str]) -> Tensor:
            return net.encode_text(tokenize(sentences).to(device)).float().cpu()

        return cls(texts, image, f"open_clip {model}/{pretrained or 'random'}")

    @classmethod
    def tiny(cls, *, seed: int = 0) -> ColorClassifier:
        """Random projections of letters and pixels: what the plumbing is tried with. It judges nothing sensible."""
        source = generator(seed, "colors")
        letters, pixels = (torch.randn(n, 16, generator=source) for n in (256, 3 * 8 * 8))

        def image(picture: Any) -> Tensor:
            small = np.asarray(picture.convert("RGB").resize((8, 8)), dtype=np.float32) / 255
            return torch.from_numpy(small).reshape(1, -1) @ pixels

        def texts(sentences: list[str]) -> Tensor:
            return torch.stack([letters[list(s.encode("utf-8", "replace"))].mean(0) for s in sentences])

        return cls(texts, image, "tiny random")

    @torch.no_grad()
    def __call__(self, image: Any, name: str, objects: Sequence[Detection], options: Options) -> list[str]:
        """Colour of each object of one class in a picture."""
        features = torch.cat([self.encode_image(crop(image, d, options)) for d in objects])
        return [COLORS[i] for i in logits_of(features, self._vectors(name)).argmax(dim=1).tolist()]

    def _vectors_of(self, name: str) -> Tensor:
        sentences = class_prompts(name)
        features = self.encode_texts([text for row in sentences for text in row])
        return classifier(features.unflatten(0, (len(sentences), -1)))


def color_of(objects: Sequence[Detection]) -> list[str]:
    """Colours that somebody else has judged.

    Raises:
        ConfigError: One has none.
    """
    if missing := [d for d in objects if d.color is None]:
        raise ConfigError(f"a detection of {missing[0].name} at {np.asarray(missing[0].box).tolist()} has no color")
    return [str(d.color) for d in objects]
