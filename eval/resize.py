"""The resizes of the published FID tools: uint8 images in, float32 values 0...255 out. They are not interchangeable.

The same image through another resize gives features that differ by up to a fifth, so a resize belongs to the name of a
protocol.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["RESIZES", "clean", "clean_legacy_pytorch", "pytorch_bilinear", "tf1_bilinear"]


def tf1_bilinear(images: UInt8[Tensor, "B 3 H W"], height: int = 299, width: int = 299) -> Float[Tensor, "B 3 h w"]:
    """TensorFlow 1's bilinear resize: corners not aligned, no half-pixel shift, no antialias.

    Source: behaviour of torch-fidelity, torchmetrics and the graph of the ADM evaluator.
    """
    x = images.float()
    low_y, high_y, frac_y = _tf1_axis(x.shape[-2], height, x.device)
    low_x, high_x, frac_x = _tf1_axis(x.shape[-1], width, x.device)
    left, right = x[..., low_x], x[..., high_x]
    across = left + (right - left) * frac_x
    top, bottom = across[..., low_y, :], across[..., high_y, :]
    return top + (bottom - top) * frac_y[:, None]


def pytorch_bilinear(images: UInt8[Tensor, "B 3 H W"], height: int = 299, width: int = 299) -> Float[Tensor, "B 3 h w"]:
    """PyTorch's bilinear resize without antialias, on values divided by 255 as pytorch-fid does, times 255 again."""
    unit = images.float() / 255
    return 255 * torch.nn.functional.interpolate(unit, size=(height, width), mode="bilinear", align_corners=False)


def clean(images: UInt8[Tensor, "B 3 H W"], height: int = 299, width: int = 299) -> Float[Tensor, "B 3 h w"]:
    """Pillow's antialiased bicubic resize of each channel in float32, clipped and not rounded.

    Source: behaviour of clean-fid in its ``clean`` mode.
    """
    from PIL import Image

    def one(channel: Tensor) -> np.ndarray:
        picture = Image.fromarray(channel.cpu().numpy().astype(np.float32))
        return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 255)

    flat = images.flatten(0, 1)
    out = np.stack([one(channel) for channel in flat])
    return torch.from_numpy(out).unflatten(0, images.shape[:2]).to(images.device)


def clean_legacy_pytorch(
    images: UInt8[Tensor, "B 3 H W"], height: int = 299, width: int = 299
) -> Float[Tensor, "B 3 h w"]:
    """PyTorch's bilinear resize without antialias on values 0...255, clipped.

    Source: behaviour of clean-fid in its ``legacy_pytorch`` mode.
    """
    x = images.float()
    out = torch.nn.functional.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
    return out.clamp(0, 255)


RESIZES = {
    "tf1": tf1_bilinear,
    "pytorch": pytorch_bilinear,
    "clean": clean,
    "clean-legacy-pytorch": clean_legacy_pytorch,
}
"""Name of a pipeline -> its resize."""


def _tf1_axis(size: int, out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # The scale is a float32 quotient and the product is taken in float32: that is what makes it equal bit by bit.
    scale = np.float32(size) / np.float32(out)
    place = np.arange(out, dtype=np.float32) * scale
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    frac = place - low.astype(np.float32)
    low, high, frac = (torch.from_numpy(x).to(device) for x in (low, high, frac.astype(np.float32)))
    return low, high, frac
