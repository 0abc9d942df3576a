"""Moments: merging, refusals, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.statistics import Moments, Statistics, file_sha256, read_statistics, write_statistics
from mmdiff.errors import ConfigError
from mmdiff.rng import generator


def features(n: int = 60, dim: int = 7, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(n, dim, generator=generator(seed, "features")) * torch.arange(1, dim + 1) + offset


def assert_close(a: Statistics, b: Statistics, tolerance: float = 1e-9) -> None:
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.covariance, b.covariance, rtol=tolerance, atol=tolerance)


def test_moments_equal_numpy() -> None:
    x = features(offset=1000.0)
    got = Statistics.of(x)
    np.testing.assert_allclose(got.mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(0, 60), batch=st.integers(1, 60), seed=st.integers(0, 5))
def test_merge_of_two_halves_equals_the_whole(cut: int, batch: int, seed: int) -> None:
    x = features(seed=seed, offset=100.0)
    one, two = Moments(7), Moments(7)
    for start in range(0, cut, batch):
        one.update(x[start : min(start + batch, cut)])
    for start in range(cut, 60, batch):
        two.update(x[start : start + batch])
    assert_close(one.merge(two).result(), Statistics.of(x))


def test_order_of_images_is_irrelevant() -> None:
    x = features()
    assert_close(Statistics.of(x.flip(0)), Statistics.of(x))


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        Statistics.of(features(1))


def test_values_that_are_not_finite_are_refused_with_the_image_number() -> None:
    x = features()
    x[41, 3] = float("nan")
    moments = Moments(7).update(x[:40])
    with pytest.raises(ConfigError, match="first image 41"):
        moments.update(x[40:])


def test_features_of_another_length_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[N, 7\]"):
        Moments(7).update(features(dim=8))


def test_files_round_trip_exactly(tmp_path: Path) -> None:
    wanted = Statistics.of(features())
    path = write_statistics(tmp_path / "sub" / "real.npz", wanted)
    got = read_statistics(path, dim=7, sha256=file_sha256(path))
    assert got.count == 60
    assert torch.equal(got.mean, wanted.mean)
    assert torch.equal(got.covariance, wanted.covariance)
    assert [p.name for p in path.parent.iterdir()] == ["real.npz"]


def test_float32_files_of_published_tools_are_read_in_float64(tmp_path: Path) -> None:
    s = Statistics.of(features())
    np.savez(tmp_path / "f.npz", mu=s.mean.float().numpy(), sigma=s.covariance.numpy())
    got = read_statistics(tmp_path / "f.npz")
    assert got.mean.dtype == got.covariance.dtype == torch.float64
    assert got.count is None


def bad_files() -> dict[str, tuple[dict[str, np.ndarray], str]]:
    mean, covariance = np.zeros(4), np.eye(4)
    skewed = np.eye(4)
    skewed[0, 1] = 0.5
    return {
        "no_sigma": ({"mu": mean}, "sigma"),
        "matrix_as_mean": ({"mu": covariance, "sigma": covariance}, "1 dimension"),
        "other_size": ({"mu": mean, "sigma": np.eye(5)}, "4 numbers"),
        "integers": ({"mu": mean.astype(int), "sigma": covariance}, "int64"),
        "not_finite": ({"mu": mean * np.nan, "sigma": covariance}, "not finite"),
        "not_symmetric": ({"mu": mean, "sigma": skewed}, "not symmetric"),
    }


@pytest.mark.parametrize("name", list(bad_files()))
def test_wrong_arrays_are_refused(name: str, tmp_path: Path) -> None:
    arrays, message = bad_files()[name]
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(ConfigError, match=message):
        read_statistics(tmp_path / "f.npz")


def test_a_file_of_other_features_is_refused(tmp_path: Path) -> None:
    path = write_statistics(tmp_path / "f.npz", Statistics.of(features()))
    with pytest.raises(ConfigError, match="7-d features, expected 2048-d"):
        read_statistics(path, dim=2048)


def test_a_wrong_hash_is_refused(tmp_path: Path) -> None:
    path = write_statistics(tmp_path / "f.npz", Statistics.of(features()))
    with pytest.raises(ConfigError, match="sha256 is"):
        read_statistics(path, sha256="0" * 64)


def test_an_object_array_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ConfigError, match="plain arrays"):
        read_statistics(tmp_path / "f.npz")


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    path = write_statistics(tmp_path / "f.npz", Statistics.of(features()))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_statistics(path)
