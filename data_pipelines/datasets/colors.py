"""Which colour a picture mostly has, said only when a person would not hesitate."""

from __future__ import annotations

import numpy as np

__all__ = ["COLORS", "MIN_FOREGROUND", "MIN_LEAD", "MIN_SHARE", "dominant_color", "name_pixels"]

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray", "white")
MIN_SHARE = 0.5
"""A colour is named when at least this share of the foreground has it ..."""
MIN_LEAD = 2.5
"""... and at least this many times as many pixels as the next colour."""
MIN_FOREGROUND = 0.03
"""Share of the picture that must be foreground."""
NEAR_WHITE = 235
"""Without transparency, pixels with all three channels from here on are background."""


def name_pixels(rgb: np.ndarray) -> np.ndarray:
    """The colour of each pixel as a number into ``COLORS``, -1 where two names would do.

    Args:
        rgb: uint8 [..., 3].

    Returns:
        int8 [...]. Hue ranges leave gaps between neighbouring names, and so do saturation and brightness.
    """
    hue, saturation, value = _hsv(rgb)
    reddish = np.where(hue > 180, hue - 360, hue)  # red is 0, pink below, orange above
    vivid = (saturation >= 0.3) & (value >= 0.3)
    bright = vivid & (saturation >= 0.58) & (value >= 0.5)
    muted = (saturation >= 0.25) & (value >= 0.3) & (value <= 0.72)
    rules = {
        "black": (value < 0.36) & (saturation < 0.5),
        "gray": (saturation < 0.12) & (value >= 0.45) & (value < 0.81),
        "white": (saturation < 0.12) & (value >= 0.87),
        "red": bright & (reddish >= -27) & (reddish <= 5),
        "orange": bright & (reddish >= 8) & (reddish <= 31) & (value >= 0.85),
        "yellow": vivid & (hue >= 35) & (hue <= 66) & (saturation >= 0.45) & (value >= 0.78),
        "green": vivid & (hue >= 80) & (hue <= 165),
        "blue": vivid & (hue >= 188) & (hue <= 248),
        "purple": vivid & (hue >= 256) & (hue <= 300) & ((value >= 0.62) | (saturation >= 0.6)),
        "pink": (value >= 0.8)
        & (saturation >= 0.2)
        & (((reddish >= -52) & (reddish <= -29)) | ((reddish > -29) & (reddish <= 15) & (saturation <= 0.5))),
        "brown": muted
        & (((reddish >= -20) & (reddish <= 38) & (saturation <= 0.58)) | ((reddish >= 9) & (reddish <= 38))),
    }
    names = np.full(rgb.shape[:-1], -1, dtype=np.int8)
    for name, where in rules.items():
        names[where & (names == -1)] = COLORS.index(name)
    return names


def dominant_color(
    rgb: np.ndarray, alpha: np.ndarray | None = None, *, min_share: float = MIN_SHARE, min_lead: float = MIN_LEAD
) -> str | None:
    """The name of the colour that clearly prevails in the foreground, or None.

    Args:
        rgb: uint8 [H, W, 3], laid over white.
        alpha: uint8 [H, W]; foreground is where it is above 127. Without it foreground is what is not nearly white,
            so ``"white"`` is never the answer.
        min_share: Least share of the foreground.
        min_lead: Least ratio to the next colour.
    """
    foreground = alpha > 127 if alpha is not None else rgb.min(axis=-1) < NEAR_WHITE
    total = int(foreground.sum())
    if total < MIN_FOREGROUND * foreground.size:
        return None
    names = name_pixels(rgb)[foreground]
    counts = np.bincount(names[names >= 0], minlength=len(COLORS))
    order = np.argsort(counts, kind="stable")[::-1]
    best, second = int(counts[order[0]]), int(counts[order[1]])
    if best < min_share * total or best < min_lead * second:
        return None
    return COLORS[order[0]]


def _hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation and value in [0, 1]."""
    scaled = rgb.astype(np.float64) / 255
    value, low = scaled.max(axis=-1), scaled.min(axis=-1)
    spread = value - low
    safe = np.where(spread > 0, spread, 1.0)
    red, green, blue = scaled[..., 0], scaled[..., 1], scaled[..., 2]
    hue = np.where(
        value == red,
        (green - blue) / safe % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return hue * 60, np.where(value > 0, spread / np.where(value > 0, value, 1.0), 0.0), value
