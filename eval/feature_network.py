"""What a feature network is: a fixed map from images to vectors, with a name and a hash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["FeatureNetwork"]


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A fixed map from images to vectors.

    Attributes:
        name: As given to `open_network`, without a path.
        sha256: Hash of the file the weights came from.
        dim: F, length of a feature vector.
        encode: uint8 RGB [B, 3, H, W] on the CPU -> float32 [B, F] on the CPU.
        encode_taps: As ``encode``, with everything one pass gives: ``features``, and where there is such a thing
            ``spatial`` (of sFID) and ``logits`` (of the Inception Score). None: features only.
        without: What the weights lack, as the end of "... not available: "; for messages.
    """

    name: str
    sha256: str
    dim: int
    encode: Callable[[UInt8[Tensor, "B 3 H W"]], Float[Tensor, "B F"]]
    encode_taps: Callable[[UInt8[Tensor, "B 3 H W"]], dict[str, Tensor]] | None = None
    without: str = "these features have no classifier and no spatial map"

    def taps(self, images: UInt8[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        """Everything one pass gives; see ``encode_taps``."""
        return self.encode_taps(images) if self.encode_taps else {"features": self.encode(images)}
