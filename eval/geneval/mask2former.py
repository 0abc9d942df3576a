"""Objects from Mask2Former's raw outputs, by the rule that GenEval's thresholds were set for.

Not the library's own post-processing: that one works at another size, has no boxes, and lets objects overwrite each
other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Instances", "fitted_size", "instances", "network_input"]

_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_SHORT, _LONG, _MULTIPLE = 800, 1333, 32


@dataclass(frozen=True)
class Instances:
    """Objects of one picture, best first.

    Attributes:
        scores: Class probability times mask quality, float [K].
        labels: Class numbers, int64 [K].
        boxes: x1, y1, x2, y2 in pixels, float [K, 4]; zeros where the mask is empty.
        masks: Bool [K, H, W].
    """

    scores: Float[Tensor, "K"]
    labels: Int[Tensor, "K"]
    boxes: Float[Tensor, "K 4"]
    masks: Bool[Tensor, "K H W"]


def fitted_size(height: int, width: int) -> tuple[int, int]:
    """Size with the same shape and a short side of at most 800 and a long one of at most 1,333."""
    scale = min(_LONG / max(height, width), _SHORT / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def network_input(image: Tensor) -> tuple[Float[Tensor, "1 3 H W"], Bool[Tensor, "1 H W"], tuple[int, int]]:
    """What the network is given.

    Args:
        image: RGB, uint8 [3, H, W].

    Returns:
        Normalised pixels, padded right and below to multiples of 32; which pixels are real; size before padding.
    """
    size = fitted_size(*image.shape[1:])
    # Bilinear without antialias at half-pixel centres is what OpenCV's resize does.
    x = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False).round().clamp(0, 255)
    x = (x - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]
    down, right = (-n % _MULTIPLE for n in size)
    real = torch.ones(1, *size, dtype=torch.bool)
    return F.pad(x, (0, right, 0, down)), F.pad(real, (0, right, 0, down)), size


def instances(
    class_logits: Float[Tensor, "Q C"],
    mask_logits: Float[Tensor, "Q h w"],
    *,
    padded: tuple[int, int],
    fitted: tuple[int, int],
    original: tuple[int, int],
    most: int = 100,
) -> Instances:
    """Objects of one picture.

    Args:
        class_logits: Of every query; the last class is "no object".
        mask_logits: Of every query, at the network's own size.
        padded: Height and width of the network's input.
        fitted: Height and width before padding.
        original: Height and width of the picture.
        most: Number of (query, class) pairs that are kept.

    Source: behaviour of mmdetection's instance post-processing for Mask2Former.
    """
    probability = class_logits.softmax(dim=-1)[:, :-1]
    best, places = probability.flatten().topk(min(most, probability.numel()))
    queries, labels = places // probability.shape[1], places % probability.shape[1]
    masks = F.interpolate(mask_logits[None], size=padded, mode="bilinear", align_corners=False)
    masks = masks[:, :, : fitted[0], : fitted[1]]
    masks = F.interpolate(masks, size=original, mode="bilinear", align_corners=False)[0][queries]
    inside = masks > 0
    area = inside.flatten(1).sum(dim=1)
    quality = (masks.sigmoid() * inside).flatten(1).sum(dim=1) / (area + 1e-6)
    scores, order = (best * quality).sort(descending=True, stable=True)
    return Instances(scores, labels[order], _boxes(inside[order]), inside[order])


def _boxes(masks: Bool[Tensor, "K H W"]) -> Float[Tensor, "K 4"]:
    out = torch.zeros(len(masks), 4)
    for number, mask in enumerate(masks):
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        if len(rows):
            corners = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            out[number] = torch.cat(corners).float()
    return out
