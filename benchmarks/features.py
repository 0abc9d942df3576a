"""Inception features: ours beside torch-fidelity's, in one run, with the same weights, images and threads.

    pip install torch-fidelity && python benchmarks/features.py [--images 64] [--batch 16] [--rounds 3]

Prints images per second and the peak memory of each, and their ratio; and how memory grows with the number of images.
The weights are random, for speed does not depend on them; both sides get the same, and their features are compared.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from eval.collect import collect
from eval.feature_network import FeatureNetwork
from eval.features import open_network
from eval.fid_protocols import PROTOCOLS
from eval.inception import Inception
from eval.sources import ImageSet


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", default=[200, 1000], help="numbers of images")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak is not None:
        print(_peak(given.peak))
        return
    _speed(given.images, given.size, given.batch, given.rounds)
    _memory(given.memory)


def _speed(images: int, size: int, batch: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(_weights(), path)
        ours = open_network(f"inception:{path}")
        theirs = _torch_fidelity(path)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, size, size), generator=generator, dtype=torch.uint8)
    sides = {"ours": lambda x: ours.taps(x)["features"], "torch-fidelity": theirs}
    found = {name: [] for name in sides}
    with torch.no_grad():
        gap = (sides["ours"](pixels[:2]) - sides["torch-fidelity"](pixels[:2])).abs().max()
        for _ in range(rounds):  # in turn, so that a busy machine is busy for both
            for name, encode in sides.items():
                found[name].append(images / _seconds(encode, pixels, batch))
    for name, rates in found.items():
        print(f"{name:16} {statistics.median(rates):8.2f} images/s (best {max(rates):.2f} of {rounds})")
    ratios = [a / b for a, b in zip(found["ours"], found["torch-fidelity"], strict=True)]
    print(f"ratio            {statistics.median(ratios):8.2f} (ours / torch-fidelity, median of pairs)")
    print(f"largest difference of the features: {float(gap):.2g}")


def _memory(counts: list[int]) -> None:
    peaks = {}
    for count in counts:
        words = [sys.executable, __file__, "--peak", str(count)]
        peaks[count] = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        print(f"peak memory with {count:6} images and no features kept: {peaks[count] / 2**20:.0f} MiB")


def _peak(count: int) -> int:
    """Peak memory of a pass whose images are made when asked for; FID, sFID and Inception Score."""

    def encode(images: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = images.flatten(1)[:, :2048].float()
        return {"features": rows, "spatial": rows[:, :2023], "logits": rows[:, :1008] / 255}

    network = FeatureNetwork(
        name="cheap", sha256="", dim=2048, encode=lambda x: encode(x)["features"], encode_taps=encode
    )
    drawn = ImageSet(
        names=[str(i) for i in range(count)],
        read=lambda i: np.random.RandomState(i).randint(0, 256, (64, 64, 3), dtype=np.uint8),
    )
    collect(drawn, network, spatial=True, splits=PROTOCOLS["torch-fidelity"].splits)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _weights() -> dict[str, torch.Tensor]:
    net = Inception()
    generator = torch.Generator().manual_seed(0)
    tensors = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    for key, value in tensors.items():
        if value.ndim == 4:
            scale = 1.4 / value[0].numel() ** 0.5
            tensors[key] = scale * torch.randn(value.shape, generator=generator)
    return tensors


def _torch_fidelity(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    return lambda pixels: net(pixels)[0]


def _seconds(encode: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, batch: int) -> float:
    start = time.perf_counter()
    for part in pixels.split(batch):
        encode(part)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
