"""Finding objects with transformers' Mask2Former; what its raw outputs mean is in `mask2former`.

Other weights than the benchmark's own detector (which no longer installs): scores of the two are not the same number,
and results carry the detector's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdiff.errors import CheckpointError

from .mask2former import instances, network_input
from .prompts import CLASSES
from .rules import Detection

__all__ = ["DEFAULT_DETECTOR", "Detector"]

DEFAULT_DETECTOR = "facebook/mask2former-swin-small-coco-instance"


class Detector:
    """A Mask2Former that knows the 80 classes.

    Args:
        net: ``Mask2FormerForUniversalSegmentation``.
        name: For the record.
        device: Where it runs.

    Raises:
        CheckpointError: It knows another number of classes.
    """

    def __init__(self, net: Any, name: str, *, device: str = "cpu") -> None:
        if net.config.num_labels != len(CLASSES):
            raise CheckpointError(f"{name}: {net.config.num_labels} classes, GenEval needs COCO's {len(CLASSES)}")
        self.net = net.eval().requires_grad_(False).to(device)
        self.name = f"{name} (transformers Mask2Former)"
        self.device = device

    @classmethod
    def from_pretrained(cls, source: str | Path = DEFAULT_DETECTOR, *, device: str = "cpu") -> Detector:
        """A detector from a local folder or the hub; safetensors only, no code of the repository runs."""
        from transformers import Mask2FormerForUniversalSegmentation

        try:
            net = Mask2FormerForUniversalSegmentation.from_pretrained(
                str(source), use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"detector {source}: cannot be loaded ({str(error).splitlines()[0]})") from None
        return cls(net, Path(source).name, device=device)

    @classmethod
    def tiny(cls, *, seed: int = 0) -> Detector:
        """Random weights, a few thousand of them: what the plumbing is tried with. It finds nothing sensible."""
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

        tower: Any = {"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4}
        tower["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
        small: Any = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32}
        small |= {"dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
        small |= {"num_labels": len(CLASSES), "num_queries": 10}
        shape = Mask2FormerConfig(backbone_config=SwinConfig(**tower), **small)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            net = Mask2FormerForUniversalSegmentation(shape)
        return cls(net, "tiny random")

    @torch.no_grad()
    def __call__(self, image: Any) -> list[Detection]:
        """Objects in a PIL image, RGB, best first, with masks."""
        rgb = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)
        pixels, real, fitted = network_input(rgb)
        out = self.net(pixel_values=pixels.to(self.device), pixel_mask=real.long().to(self.device))
        found = instances(
            out.class_queries_logits[0].float().cpu(),
            out.masks_queries_logits[0].float().cpu(),
            padded=(pixels.shape[-2], pixels.shape[-1]),
            fitted=fitted,
            original=(rgb.shape[-2], rgb.shape[-1]),
        )
        rows: Sequence[Any] = list(zip(found.scores, found.labels, found.boxes, found.masks, strict=True))
        return [
            Detection(name=CLASSES[int(label)], box=box.numpy(), score=float(score), mask=mask.numpy())
            for score, label, box, mask in rows
        ]
