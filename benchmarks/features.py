"""Features of image sets: ours beside torch-fidelity's, in one run: same weights, same pictures, same threads.

    pip install torch-fidelity 'mmdiff[inception]' && OMP_NUM_THREADS=1 python benchmarks/features.py

Each line is a process of its own, so its peak memory is its own. Three parts:

1. Inception features and their mean and covariance, from a folder of PNG files (real pictures, embedded in the package)
   at two numbers of images. Speed is that of the images between the two numbers: start-up does not count.
   torch-fidelity has its own defaults, with worker processes for reading whose memory is not counted.
2. The same at large numbers with a network that costs nothing: how memory grows.
3. Precision and recall, which need every feature vector: how memory grows (ours only).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIDES = ("ours", "torch-fidelity")
DIM = 2048
SHAPE = (64, 64, 3)


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, nargs=2, default=[32, 128], help="numbers of images, part 1")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--many", type=int, nargs=2, default=[2000, 20000], help="numbers of images, part 2")
    parser.add_argument("--pairs", type=int, nargs=2, default=[3000, 9000], help="numbers of images, part 3")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part is not None:
        kind, side, number = given.part
        print(json.dumps(PARTS[kind](side, int(number), given.batch)))
        return
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder), max(given.images))
        _speed(given, Path(folder))
    _growth(given, "many", "mean and covariance, a network that costs nothing", SIDES)
    _growth(given, "pairs", "precision and recall", SIDES[:1])


def _speed(given: argparse.Namespace, folder: Path) -> None:
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for _ in range(given.rounds):  # in turn, so that a busy machine is busy for both
        for side in SIDES:
            for number in given.images:
                runs[side, number] = _run("folder", side, number, given.batch, folder)
            few, many = (runs[side, number] for number in given.images)
            rates[side].append((given.images[1] - given.images[0]) / (many["seconds"] - few["seconds"]))
    print(f"Inception, folder of PNG, {torch.get_num_threads()} thread(s), batches of {given.batch}")
    for side in SIDES:
        peaks = ", ".join(f"{runs[side, n]['peak']:.0f} MiB at {n} images" for n in given.images)
        told = " ".join(f"{rate:.2f}" for rate in rates[side])
        print(f"  {side:15} {statistics.median(rates[side]):6.2f} images/s (median of {told}); peak {peaks}")
    ratios = [a / b for a, b in zip(*(rates[side] for side in SIDES), strict=True)]
    print(f"  ratio           {statistics.median(ratios):6.2f} (ours / torch-fidelity, median of pairs)")
    means = [np.asarray(runs[side, given.images[1]]["mean"]) for side in SIDES]
    print(f"  largest difference of the means of the features: {np.abs(means[0] - means[1]).max():.1e}")


def _growth(given: argparse.Namespace, part: str, what: str, sides: Iterable[str]) -> None:
    few, many = getattr(given, part)
    print(f"peak memory, {what}")
    for side in sides:
        peaks = [_run(part, side, number, given.batch)["peak"] for number in (few, many)]
        rise = 1024 * (peaks[1] - peaks[0]) / (many - few)
        print(f"  {side:15} {peaks[0]:.0f} MiB at {few:,}, {peaks[1]:.0f} MiB at {many:,}: {rise:.2f} KiB per image")


def _run(part: str, side: str, number: int, batch: int, folder: Path | None = None) -> dict[str, Any]:
    words = [sys.executable, __file__, "--batch", str(batch), "--part", part, side, str(number)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _prepare(folder: Path, number: int) -> None:
    """Real pictures as PNG files, and the published weights where both programs can read them."""
    from eval.inception import find_weights, read_weights
    from eval.sources import open_images
    from mmdiff.images import encode_png

    tensors = dict(read_weights(find_weights()))
    if "fc.weight" not in tensors:  # torch-fidelity wants a classifier, which features do not touch
        tensors |= {"fc.weight": torch.zeros(1008, DIM), "fc.bias": torch.zeros(1008)}
    torch.save(tensors, folder / "weights.pth")
    (folder / "pictures").mkdir()
    pictures = open_images("embedded:emoji/train").take(number)
    for place in range(number):
        (folder / "pictures" / f"{place:05d}.png").write_bytes(encode_png(pictures.read(place)))


def _folder(side: str, number: int, batch: int) -> dict[str, Any]:
    """Mean and covariance of the Inception features of the first files of a folder."""
    files = sorted(Path("pictures").iterdir())[:number]
    if side == "ours":
        from eval.collect import collect
        from eval.features import open_network
        from eval.sources import ImageSet, open_images

        network = open_network("inception:weights.pth")
        whole = open_images("pictures")
        images = ImageSet(names=whole.names[:number], read=whole.read, threads=whole.threads)
        start = time.perf_counter()
        mean = collect(images, network, batch_size=batch).statistics.mean.tolist()
    else:
        from torch_fidelity.datasets import ImagesPathDataset
        from torch_fidelity.utils import create_feature_extractor

        network = create_feature_extractor(
            "inception-v3-compat",
            [str(DIM)],
            cuda=False,
            verbose=False,
            feature_extractor_weights_path="weights.pth",
        )
        start = time.perf_counter()
        mean = _theirs(ImagesPathDataset([str(f) for f in files]), network, batch)
    return {"seconds": time.perf_counter() - start, "peak": _peak(), "mean": mean}


def _theirs(dataset: Any, network: Any, batch: int) -> list[float]:
    """Mean of the features, after the covariance is taken as well."""
    from torch_fidelity.metric_fid import fid_features_to_statistics
    from torch_fidelity.utils import get_featuresdict_from_dataset

    found = get_featuresdict_from_dataset(dataset, network, batch, False, False, False)
    return fid_features_to_statistics(found[str(DIM)])["mu"].tolist()


def _picture(place: int) -> np.ndarray:
    return np.random.RandomState(place).randint(0, 256, SHAPE, dtype=np.uint8)


def _many(side: str, number: int, batch: int) -> dict[str, Any]:
    """Mean and covariance at numbers of images for which a network would take hours: the pixels are the features."""
    if side == "ours":
        from eval.collect import collect

        collect(_drawn(number), _free(), spatial=True, batch_size=batch)
        return {"peak": _peak()}
    from torch.utils.data import Dataset
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Drawn(Dataset):
        def __len__(self) -> int:
            return number

        def __getitem__(self, place: int) -> torch.Tensor:
            return torch.from_numpy(_picture(place)).permute(2, 0, 1)

    class Free(FeatureExtractorBase):
        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (str(DIM),)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (images.flatten(1)[:, :DIM].float(),)

    _theirs(Drawn(), Free("free", [str(DIM)]), batch)
    return {"peak": _peak()}


def _pairs(side: str, number: int, batch: int) -> dict[str, Any]:
    from eval.collect import collect
    from eval.neighbours import precision_recall

    generated, real = (
        collect(_drawn(number, shift), _free(), keep_features=True, batch_size=batch).features for shift in (0, number)
    )
    precision_recall(generated, real)
    return {"peak": _peak()}


def _drawn(number: int, shift: int = 0) -> Any:
    from eval.sources import ImageSet

    return ImageSet(names=[str(i) for i in range(number)], read=lambda i: _picture(i + shift))


def _free() -> Any:
    from eval.feature_network import FeatureNetwork

    def taps(images: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = images.flatten(1)[:, :DIM].float()
        return {"features": rows, "spatial": rows[:, :2023]}

    return FeatureNetwork(name="free", sha256="", dim=DIM, encode=lambda x: taps(x)["features"], encode_taps=taps)


PARTS = {"folder": _folder, "many": _many, "pairs": _pairs}

if __name__ == "__main__":
    main()
