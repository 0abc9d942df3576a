"""FID and KID against other formulas, and what a set of images must be."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval import fid
from eval.features import FeatureNetwork, extract, open_network
from eval.kid import kid, kid_subsets
from eval.sources import open_images
from eval.statistics import Statistics, write_statistics
from mmdiff.errors import ConfigError
from mmdiff.rng import generator


def draw(n: int, dim: int = 12, *, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    gen = generator(seed, "draw")
    return torch.randn(n, dim, generator=gen) @ torch.randn(dim, dim, generator=gen) + shift


def network() -> FeatureNetwork:
    """Mean colour and its square: enough to tell sets apart."""

    def encode(images: torch.Tensor) -> torch.Tensor:
        mean = images.float().mean(dim=(2, 3)) / 255
        return torch.cat([mean, mean.square()], dim=1)

    return FeatureNetwork(name="colour", sha256="0" * 64, dim=6, encode=encode)


@pytest.fixture
def colour(monkeypatch: pytest.MonkeyPatch) -> FeatureNetwork:
    monkeypatch.setitem(open_network.__globals__["NETWORKS"], "colour", lambda path, device: network())
    return network()


def write_images(folder: Path, n: int, *, seed: int = 0, size: int = 8) -> Path:
    folder.mkdir()
    rows = torch.randint(0, 256, (n, size, size, 3), generator=generator(seed, "images"), dtype=torch.uint8)
    for i, row in enumerate(rows):
        Image.fromarray(row.numpy()).save(folder / f"{i:05d}.png")
    return folder


@pytest.mark.parametrize("n", [40, 8], ids=["full_rank", "fewer_images_than_features"])
def test_frechet_distance_equals_scipy_matrix_root(n: int) -> None:
    from scipy.linalg import sqrtm

    a, b = Statistics.of(draw(n)), Statistics.of(draw(50, seed=1, shift=0.3))
    root = sqrtm((a.covariance @ b.covariance).numpy()).real
    wanted = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()) - 2 * np.trace(root)
    assert fid.frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    assert fid.frechet_distance(b, a) == pytest.approx(wanted, rel=1e-6)


def test_frechet_distance_of_diagonal_gaussians_by_hand() -> None:
    one = Statistics(mean=torch.tensor([0.0, 3.0]).double(), covariance=torch.diag(torch.tensor([4.0, 1.0])).double())
    two = Statistics(mean=torch.tensor([1.0, 1.0]).double(), covariance=torch.diag(torch.tensor([1.0, 9.0])).double())
    assert fid.frechet_distance(one, two) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (1 - 3) ** 2)


def test_distance_of_a_set_to_itself_is_zero() -> None:
    x = draw(64)
    assert abs(fid.score(x, x).fid) < 1e-9 * float(Statistics.of(x).covariance.trace())


def test_kid_equals_the_formula_written_out() -> None:
    a, b = draw(25).double(), draw(31, seed=1, shift=0.2).double()

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 12 + 1) ** 3)

    aa = sum(kernel(a[i], a[j]) for i in range(25) for j in range(25) if i != j) / (25 * 24)
    bb = sum(kernel(b[i], b[j]) for i in range(31) for j in range(31) if i != j) / (31 * 30)
    ab = sum(kernel(x, y) for x in a for y in b) / (25 * 31)
    assert kid(a, b).mean == pytest.approx(aa + bb - 2 * ab, rel=1e-10)


def test_kid_is_unbiased_where_fid_is_not() -> None:
    gen = generator(0, "kid")
    pairs = [(torch.randn(20, 4, generator=gen), torch.randn(20, 4, generator=gen)) for _ in range(300)]
    estimates = torch.tensor([kid(a, b).mean for a, b in pairs])
    assert abs(float(estimates.mean())) < 4 * float(estimates.std()) / 300**0.5
    assert min(fid.score(a, b).fid for a, b in pairs[:50]) > 0.05


def test_kid_standard_error_matches_the_spread_of_repetitions() -> None:
    gen = generator(1, "kid")
    results = [kid(torch.randn(100, 4, generator=gen), 1.2 * torch.randn(100, 4, generator=gen)) for _ in range(60)]
    spread = float(torch.tensor([r.mean for r in results]).std())
    claimed = float(torch.tensor([r.std for r in results]).mean())
    assert 0.6 * spread < claimed < 1.7 * spread


def test_kid_subsets_are_seeded_and_leave_global_state_alone() -> None:
    a, b = draw(50), draw(50, seed=1)
    before = np.random.get_state()[1].copy()
    first = kid_subsets(a, b, subsets=5, subset_size=20)
    assert first == kid_subsets(a, b, subsets=5, subset_size=20)
    assert first != kid_subsets(a, b, subsets=5, subset_size=20, seed=1)
    assert np.array_equal(before, np.random.get_state()[1])


def test_subsets_larger_than_a_set_are_refused() -> None:
    with pytest.raises(ConfigError, match="subsets of 1000"):
        fid.score(draw(50), draw(50), protocol="torch-fidelity")


def test_score_with_statistics_on_one_side_has_no_kid() -> None:
    a, b = draw(64), draw(80, seed=1)
    whole, half = fid.score(a, b), fid.score(a, Statistics.of(b))
    assert half.fid == pytest.approx(whole.fid, rel=1e-12)
    assert (half.kid_mean, half.n_b, whole.kid_mean is None) == (None, 80, False)


def test_name_carries_the_count() -> None:
    assert fid.score(draw(64), draw(70)).name == "fid64"
    assert fid.score(draw(2000), draw(70)).name == "fid2k"


def test_floor_is_real_against_real_at_the_same_count() -> None:
    result = fid.score(draw(40), draw(200, seed=1), floor=True)
    assert (result.floor_n, result.floor is not None) == (40, True)
    with pytest.raises(ConfigError, match="only their statistics"):
        fid.score(draw(40), Statistics.of(draw(200)), floor=True)


def test_features_of_different_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match="different networks"):
        fid.score(draw(40), Statistics.of(draw(40, 11)))


def test_r27_order_of_files_is_irrelevant(tmp_path: Path, colour: FeatureNetwork) -> None:
    folder, other = write_images(tmp_path / "a", 30), write_images(tmp_path / "b", 30, seed=1)
    first = fid.compare(folder, other, features="colour")
    renamed = tmp_path / "c"
    renamed.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        (renamed / f"{29 - i:05d}.png").write_bytes(file.read_bytes())
    second = fid.compare(renamed, other, features="colour")
    assert second.fid == pytest.approx(first.fid, rel=1e-9)
    assert second.kid_mean == pytest.approx(first.kid_mean, rel=1e-9)


def test_r27_two_ranks_equal_one(tmp_path: Path) -> None:
    from eval.statistics import Moments

    x, reference = draw(64), Statistics.of(draw(80, seed=1))
    ranks = Moments(12).update(x[0::2]).merge(Moments(12).update(x[1::2])).result()
    assert fid.score(ranks, reference).fid == pytest.approx(fid.score(x, reference).fid, rel=1e-9)


def test_r27_a_missing_image_is_refused_by_number(tmp_path: Path, colour: FeatureNetwork) -> None:
    folder = write_images(tmp_path / "a", 12)
    (folder / "00007.png").unlink()
    with pytest.raises(ConfigError, match=r"1 of 12 numbered images missing: 00007"):
        extract(folder, colour)


def test_fewer_images_than_asked_for_are_refused(tmp_path: Path, colour: FeatureNetwork) -> None:
    with pytest.raises(ConfigError, match="12 images, and 13 are asked for"):
        extract(write_images(tmp_path / "a", 12), colour, num=13)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_r27_a_corrupt_image_is_refused_by_name(damage: str, tmp_path: Path, colour: FeatureNetwork) -> None:
    folder = write_images(tmp_path / "a", 12)
    victim = folder / "00005.png"
    data = {"cut": victim.read_bytes()[:-60], "text": b"not a picture", "empty": b""}[damage]
    victim.write_bytes(data)
    with pytest.raises(ConfigError, match=r"00005\.png: cannot be decoded"):
        extract(folder, colour)


def test_r27_an_image_of_another_size_is_refused_by_name(tmp_path: Path, colour: FeatureNetwork) -> None:
    folder = write_images(tmp_path / "a", 12)
    Image.new("RGB", (8, 9)).save(folder / "00009.png")
    with pytest.raises(ConfigError, match=r"00009\.png: 8x9 pixels, but .*00000\.png has 8x8"):
        extract(folder, colour, batch_size=4)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no images"):
        open_images(tmp_path)


def test_choice_of_images_is_seeded_and_exact() -> None:
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 2, 2, 3)
    chosen = open_images(images).take(7, seed=3)
    values = torch.cat(list(chosen.batches(3)))[:, 0, 0, 0].tolist()
    assert len(set(values)) == 7
    assert values == sorted(values)
    again = torch.cat(list(open_images(images).take(7, seed=3).batches(5)))[:, 0, 0, 0].tolist()
    assert again == values


def test_npz_of_images_equals_the_folder(tmp_path: Path, colour: FeatureNetwork) -> None:
    folder = write_images(tmp_path / "a", 9)
    rows = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.iterdir())])
    np.savez(tmp_path / "a.npz", rows)
    assert torch.equal(extract(tmp_path / "a.npz", colour), extract(folder, colour))
    np.savez(tmp_path / "b.npz", rows.astype(np.float32))
    with pytest.raises(ConfigError, match="uint8"):
        open_images(tmp_path / "b.npz")


def test_shards_equal_the_folder(tmp_path: Path, colour: FeatureNetwork) -> None:
    from data_pipelines.pack import write_shards

    folder = write_images(tmp_path / "a", 9)
    samples = [(p.stem, {"png": p.read_bytes()}) for p in sorted(folder.iterdir())]
    write_shards(samples, tmp_path / "shards", "part", samples_per_shard=4)
    assert torch.equal(extract(tmp_path / "shards", colour), extract(folder, colour))


def test_command_prints_the_same_numbers(
    tmp_path: Path, colour: FeatureNetwork, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_images(tmp_path / "a", 20), write_images(tmp_path / "b", 20, seed=1)
    assert fid.main([str(a), str(b), "--features", "colour"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["fid"] == fid.compare(a, b, features="colour").fid
    path = write_statistics(tmp_path / "b.npz", Statistics.of(extract(b, colour)))
    assert fid.main([str(a), str(path), "--features", "colour"]) == 0
    assert json.loads(capsys.readouterr().out)["fid"] == pytest.approx(printed["fid"], rel=1e-9)
    assert fid.main([str(tmp_path / "none"), str(b), "--features", "colour"]) == 2
    assert "none" in capsys.readouterr().err


def test_unknown_features_and_measures_are_refused() -> None:
    with pytest.raises(ConfigError, match="efficientnet-lite0"):
        open_network("vgg")
    with pytest.raises(ConfigError, match="torch-fidelity"):
        fid.score(draw(10), draw(10), protocol="best")


def test_jpeg_and_webp_are_found_recursively(tmp_path: Path) -> None:
    for name in ("x/one.jpg", "y/two.webp", "three.PNG"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4)).save(buffer, format={"jpg": "JPEG", "ebp": "WEBP", "PNG": "PNG"}[name[-3:]])
        path.write_bytes(buffer.getvalue())
    (tmp_path / "notes.txt").write_text("no image")
    assert [Path(n).name for n in open_images(tmp_path).names] == ["three.PNG", "one.jpg", "two.webp"]
