"""Objective of image tokenizers and autoencoders: pixels, outlines, and, if asked for, the features of a network.

Source: the perceptual term is that of LPIPS (arXiv 1801.03924), equation 1, with equal weights of all channels.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff import rng
from mmdiff.batch import Batch
from mmdiff.config import Field, config
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.io.checkpoint import read_tensors
from mmdiff.training.losses import Losses

__all__ = ["Autoencoding", "Perceptual"]


@config
class Perceptual:
    """A network whose features of the reconstruction shall be those of the image."""

    network: str = "vgg16"
    """Name of a timm model that gives the features of its stages."""
    weights: str | None = None
    """File with the weights under timm's names (safetensors, or .pth with tensors only); null: those that timm offers
    on the hub for this name."""
    weight: float = Field(1.0, gt=0)
    """Factor of the term."""

    def distance(self, a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        """Mean over images and positions of the squared distance of unit features, summed over the stages."""
        stages, mean, std = _stages(self.network, self.weights, a.device)
        least = stages.feature_info.reduction()[-1]
        if min(a.shape[-2:]) < least:
            raise ConfigError(f"objective.perceptual.network {self.network!r}: images of {least} pixels at least")
        total = a.new_zeros(())
        for x, y in zip(*(stages(((p + 1) / 2 - mean) / std) for p in (a, b)), strict=True):
            gap = F.normalize(x, dim=1, eps=1e-10) - F.normalize(y, dim=1, eps=1e-10)
            total = total + gap.square().sum(1).mean()
        return total


@config
class Autoencoding:
    """Reconstruction of images through a bottleneck."""

    type: Literal["autoencoding"] = "autoencoding"
    """Objective name."""
    scales: int = Field(3, gt=0)
    """Number of resolutions (each half of the one before) at which images are compared."""
    edges: float = Field(1.0, ge=0)
    """Weight of the difference of image gradients, which keeps outlines sharp."""
    perceptual: Perceptual | None = None
    """Compare features of another network, too; null: pixels only."""
    penalty: float = Field(1e-4, ge=0)
    """Weight of the bottleneck's own term: the KL divergence of a KL autoencoder (about 1e-6 to 1e-3), codebook and
    commitment of a VQGAN (about 1); no effect on finite scalar quantisation."""

    def __call__(self, model: nn.Module, batch: Batch, source: rng.Source) -> Losses:
        """Mean absolute error over scales plus the same of horizontal and vertical differences."""
        if batch.pixels is None:
            raise ConfigError("objective autoencoding: needs a task that yields pixels, such as 'image'")
        pixels = batch.pixels
        output, bottleneck = model(pixels)
        own: Any = getattr(model, "penalty", None)
        total = self._of_pixels(output, pixels)
        if own is not None:
            total = total + self.penalty * own(bottleneck)
        if self.perceptual is not None:
            total = total + self.perceptual.weight * self.perceptual.distance(output, pixels)
        terms = {"image": (F.l1_loss(output.detach(), pixels) * len(batch), len(batch))}
        usage: Any = getattr(model, "usage", None)
        if usage is not None:
            # Per image, so that it does not depend on the size of a part; a collapse is seen all the same.
            terms["usage"] = (usage(bottleneck.detach()).sum(), len(batch))
        return Losses(total, terms)

    def _of_pixels(self, a: Tensor, b: Tensor) -> Tensor:
        total = b.new_zeros(())
        for _ in range(self.scales):
            total = total + F.l1_loss(a, b) + F.mse_loss(a, b)
            total = total + self.edges * (
                F.l1_loss(a.diff(dim=2), b.diff(dim=2)) + F.l1_loss(a.diff(dim=3), b.diff(dim=3))
            )
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        return total


@cache
def _stages(name: str, weights: str | None, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """The frozen network, and mean and deviation of the colours that it was trained with."""
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise ConfigError(f"objective.perceptual.network {name!r}: timm has no model of that name")
    net: Any = timm.create_model(name, pretrained=weights is None, features_only=True)
    if weights is not None:
        _load(net, Path(weights))
    colours = timm.data.resolve_data_config({}, model=net, pretrained_cfg=net.pretrained_cfg)
    mean, std = (torch.tensor(colours[key], device=device)[:, None, None] for key in ("mean", "std"))
    return net.eval().requires_grad_(False).to(device), mean, std


def _load(net: nn.Module, path: Path) -> None:
    """Fill in the stages; what the file holds beyond them, such as the classifier, is not needed."""
    given, own = dict(read_tensors(path)), net.state_dict()
    # Stages of a sequence are kept as features_0 where the network itself says features.0.
    names = {key: key if key in given else key.replace("_", ".", 1) for key in own}
    wrong = [k for k, n in names.items() if n not in given or given[n].shape != own[k].shape]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} of {len(own)} tensors of the feature network are missing or of another shape, such "
            f"as {wrong[0]!r}; objective.perceptual.weights needs a file with timm's names for this network"
        )
    net.load_state_dict({key: given[n] for key, n in names.items()})
