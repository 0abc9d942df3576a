"""The protocols of the FID tools, one pass, several processes, files of four kinds, and what each refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from eval import fid
from eval.collect import Collected, collect
from eval.features import open_network
from eval.fid_interval import interval
from eval.fid_protocols import PROTOCOLS
from eval.inception import PUBLISHED_FILES, find_weights, read_weights
from eval.inception_score import inception_score, splits_in_order, splits_shuffled
from eval.kid import kid
from eval.neighbours import coverage, precision_recall
from eval.published import comparison
from eval.rows import RowFile
from eval.sources import open_images
from eval.statistics import Statistics, read_statistics, write_statistics
from mmdiff.cli import app
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.rng import generator


def pictures(n: int, *, seed: int = 0, size: int = 8) -> np.ndarray:
    return torch.randint(0, 256, (n, size, size, 3), generator=generator(seed, "p"), dtype=torch.uint8).numpy()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network with every tap, small enough to reason about."""
    from eval import features

    def build(path: str, device: torch.device) -> features.FeatureNetwork:
        def taps(images: torch.Tensor) -> dict[str, torch.Tensor]:
            x = images.float().flatten(1)[:, :192:24] / 255
            return {"features": x, "spatial": x[:, :3].square(), "logits": 4 * x[:, :5]}

        return features.FeatureNetwork(
            name="toy", sha256="0" * 64, dim=8, encode=lambda x: taps(x)["features"], encode_taps=taps
        )

    monkeypatch.setitem(features.NETWORKS, "toy", build)


def test_all_measures_come_from_one_pass(toy: None) -> None:
    a, b = pictures(60), pictures(70, seed=1)
    result = fid.compare(a, b, features="toy", measures=fid.MEASURES, draws=20)
    taps = open_network("toy").taps
    one, two = (taps(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (a, b))
    assert result.fid == pytest.approx(fid.score(one["features"], two["features"]).fid, rel=1e-9)
    assert result.sfid == pytest.approx(fid.score(one["spatial"], two["spatial"]).fid, rel=1e-9)
    assert result.kid_mean == pytest.approx(kid(one["features"], two["features"]).mean)
    assert result.isc_mean == pytest.approx(inception_score(one["logits"], splits_shuffled(60)).mean)
    assert result.precision == precision_recall(one["features"], two["features"]).precision
    assert result.coverage == coverage(one["features"], two["features"]).coverage
    assert result.cmmd is not None
    assert result.interval.lower < result.fid < result.interval.upper


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_each_protocol_has_its_own_resize(name: str) -> None:
    networks = {"pytorch-fid": "inception-pytorch", "clean": "inception-clean"}
    networks["clean-legacy-pytorch"] = "inception-clean-legacy-pytorch"
    rules = PROTOCOLS[name]
    assert rules.network == networks.get(name, "inception")
    assert rules.network_for("inception:x.pth") == f"{rules.network}:x.pth"
    assert rules.network_for("dinov2") == "dinov2"


def test_protocols_say_when_a_count_is_not_the_published_one(toy: None) -> None:
    result = fid.compare(pictures(30), pictures(30, seed=1), features="toy", protocol="adm")
    assert result.name == "fid30"
    assert any("not comparable with values of 50,000 images" in note for note in result.notes)
    assert any("order of the files" in note for note in result.notes)
    assert None not in (result.sfid, result.isc_mean, result.precision)


def test_a_score_that_cannot_be_had_is_none_and_says_why(toy: None, tmp_path: Path) -> None:
    path = write_statistics(tmp_path / "s.npz", Statistics.of(torch.rand(40, 8, generator=generator(0, "s"))))
    result = fid.compare(pictures(30), path, features="toy", measures=("fid", "kid", "sfid", "pr"))
    assert (result.kid_mean, result.sfid, result.precision) == (None, None, None)
    assert len([n for n in result.notes if "not available" in n]) == 3
    assert result.statistics_sha256
    plain = fid.score(torch.rand(9, 3), torch.rand(9, 3), measures=("isc",))
    assert plain.isc_mean is None
    assert "Inception Score not available" in plain.notes[0]


def test_statistics_of_four_kinds(toy: None, tmp_path: Path) -> None:
    a, b = pictures(40), pictures(50, seed=1)
    taps = open_network("toy").taps(torch.from_numpy(b).permute(0, 3, 1, 2))
    own, spatial = Statistics.of(taps["features"]), Statistics.of(taps["spatial"])
    mean, covariance = own.mean.numpy(), own.covariance.numpy()
    np.savez(tmp_path / "pytorch-fid.npz", mu=mean, sigma=covariance)
    np.savez(tmp_path / "torch-fidelity.npz", mu=mean.astype(np.float32), sigma=covariance)
    np.savez_compressed(tmp_path / "clean.npz", mu=mean, sigma=covariance)
    arrays = {"mu": mean, "sigma": covariance, "mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
    np.savez(tmp_path / "adm.npz", arr_0=b, **arrays)
    whole = fid.compare(a, b, features="toy", measures=fid.MEASURES)
    for name in ("pytorch-fid", "torch-fidelity", "clean"):
        found = fid.compare(a, tmp_path / f"{name}.npz", features="toy")
        assert found.fid == pytest.approx(whole.fid, rel=1e-5)
    adm = fid.compare(a, tmp_path / "adm.npz", features="toy", protocol="adm")
    assert (adm.sfid, adm.precision) == (pytest.approx(whole.sfid), whole.precision)


def test_written_statistics_are_read_back_with_the_spatial_ones(toy: None, tmp_path: Path) -> None:
    one = collect(open_images(pictures(30)), open_network("toy"), spatial=True)
    path = write_statistics(tmp_path / "s.npz", one.statistics, spatial=one.spatial)
    assert torch.equal(read_statistics(path, spatial=True).covariance, one.spatial.covariance)
    with pytest.raises(ConfigError, match="mu_s"):
        read_statistics(write_statistics(path, one.statistics), spatial=True)


def test_a_generator_of_batches_is_an_image_set(toy: None) -> None:
    a, b = pictures(30), pictures(30, seed=1)
    streamed = fid.compare((a[i : i + 7] for i in range(0, 30, 7)), b, features="toy")
    assert streamed.fid == pytest.approx(fid.compare(a, b, features="toy").fid)
    with pytest.raises(ConfigError, match="after image 7"):
        open_images(x for x in (a[:7], pictures(3, size=9)))
    with pytest.raises(ConfigError, match="gave none"):
        open_images(iter(()))


def test_an_uncompressed_batch_is_mapped_and_not_read(tmp_path: Path) -> None:
    a = pictures(20)
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez_compressed(tmp_path / "b.npz", arr_0=a)
    for name in ("a", "b"):
        (batch,) = open_images(tmp_path / f"{name}.npz").batches(20)
        assert np.array_equal(batch.numpy(), a)
    assert isinstance(open_images(tmp_path / "a.npz").read(0).base, np.memmap)


def test_features_above_the_limit_lie_in_a_file(monkeypatch: pytest.MonkeyPatch, toy: None) -> None:
    from eval import rows

    a, b = pictures(90), pictures(80, seed=1)
    options = {"features": "toy", "measures": fid.MEASURES, "draws": 3, "floor": True}
    wanted = fid.compare(a, b, **options)
    monkeypatch.setattr(rows, "_MEMORY_BYTES", 100)
    monkeypatch.setattr(rows.blocks, "__defaults__", (16,))
    found = fid.compare(a, b, **options)
    for name, value in dataclasses.asdict(wanted).items():
        assert getattr(found, name) == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else ANY), name


def test_rows_in_a_file_are_indexed_as_a_tensor_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told = torch.rand(40, 8, generator=generator(0, "rows"))
    rows = RowFile(40, 8)
    rows[0:25], rows[25:40] = told[:25], told[25:]
    order = torch.tensor([39, 0, 7, 7])
    assert torch.equal(rows[order], told[order])
    assert torch.equal(rows[30:99], told[30:])
    assert rows[40:].shape == (0, 8)
    assert rows.shape == (40, 8)
    assert len(rows) == 40
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda buffering: open("/dev/full", "r+b", buffering=buffering))
    with pytest.raises(ConfigError, match="no room for 1,280 bytes of features"):
        RowFile(40, 8)


def test_interval_is_about_the_spread_of_repetitions() -> None:
    gen = generator(0, "interval")
    reference = Collected(statistics=Statistics.of(torch.randn(4000, 4, generator=gen)))
    runs = [fid.score(0.8 * torch.randn(200, 4, generator=gen), reference).fid for _ in range(40)]
    told = interval(0.8 * torch.randn(200, 4, generator=gen), reference, draws=100)
    assert 0.5 < told.std / float(torch.tensor(runs).std()) < 2
    with pytest.raises(ConfigError, match="judged images"):
        interval(None, reference)


def test_inception_score_by_hand() -> None:
    logits = torch.tensor([[50.0, 0.0], [0.0, 50.0]]).repeat(4, 1)
    assert inception_score(logits, splits_in_order(8, size=4)).mean == pytest.approx(2)
    assert splits_in_order(12, size=5).tolist() == [0] * 5 + [1] * 5 + [2] * 2
    counts = np.bincount(splits_shuffled(23))
    assert counts.sum() == 23
    assert counts.max() - counts.min() <= 1


def test_neighbours_with_doubles_and_a_large_offset() -> None:
    a = torch.rand(50, 6, generator=generator(0, "n"))
    assert precision_recall(a, a.clone()) == precision_recall(a + 1e4, a.clone() + 1e4)
    doubled = torch.cat([a[:10]] * 5)
    found = precision_recall(doubled, doubled.clone())
    assert (found.precision, found.recall) == (1, 1)
    assert precision_recall(doubled, doubled.clone(), strict=True).precision == 0
    with pytest.raises(ConfigError, match="neighbour 5"):
        coverage(a[:4], a, k=5)


def test_unknown_measures_and_protocols_are_refused(toy: None) -> None:
    with pytest.raises(ConfigError, match="measure 'ssim'"):
        fid.compare(pictures(9), pictures(9), features="toy", measures=("ssim",))
    with pytest.raises(ConfigError, match="pytorch-fid"):
        fid.compare(pictures(9), pictures(9), features="toy", protocol="best")


def test_weights_are_found_in_the_hub_cache_and_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / PUBLISHED_FILES[1]
    path.write_bytes(b"not the published weights")
    assert find_weights() == path
    with pytest.raises(CheckpointError, match="not the one in its name"):
        read_weights(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_weights(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("name", "dim"), [("timm:resnet10t", 512), pytest.param("open_clip:RN50", 1024, marks=pytest.mark.slow)]
)
def test_networks_of_other_libraries_load_from_a_file(name: str, dim: int, tmp_path: Path) -> None:
    import open_clip
    import timm
    from safetensors.torch import save_file

    library, _, model = name.partition(":")
    with torch.random.fork_rng(devices=[]):
        net = timm.create_model(model) if library == "timm" else open_clip.create_model(model)
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous().clone() for k, v in net.state_dict().items()}, path)
    network = open_network(f"{name}@{path}")
    assert (network.name, network.dim, len(network.sha256)) == (name, dim, 64)
    x = torch.from_numpy(pictures(2, size=40)).permute(0, 3, 1, 2)
    together = network.encode(x)
    torch.testing.assert_close(network.encode(x[1:]), together[1:], rtol=1e-3, atol=1e-3)
    state = net.state_dict()
    save_file({k: v.contiguous().clone() for k, v in list(state.items())[1:]}, path)
    with pytest.raises(CheckpointError, match="1 tensors missing"):
        open_network(f"{name}@{path}")
    with pytest.raises(ConfigError, match="no model of that name"):
        open_network(f"{library}:nonsense@{path}")


def test_the_command_writes_a_page_with_neighbours_and_compares(toy: None, tmp_path: Path) -> None:
    for name, rows in (("a", pictures(20)), ("b", pictures(25, seed=1))):
        (tmp_path / name).mkdir()
        for i, row in enumerate(rows):
            Image.fromarray(row).save(tmp_path / name / f"{i:05d}.png")
    words = ["eval", "fid", str(tmp_path / "a"), str(tmp_path / "b"), "--features", "toy", "--measures", "all"]
    words += ["--out", str(tmp_path / "out"), "--compare", "imagenet256", "--device", "cpu", "--draws", "5"]
    words += ["--save-statistics", str(tmp_path / "a.npz")]
    printed = CliRunner().invoke(app, words)
    assert printed.exit_code == 0, printed.output
    assert "eMIGM-L" in printed.stdout
    assert "this run" in printed.stdout
    tree = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(tree["items"]) == 20
    assert tree["settings"]["seed"] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Farthest from every reference image" in page
    again = fid.compare(tmp_path / "a.npz", tmp_path / "b", features="toy")
    assert again.fid == pytest.approx(tree["result"]["fid"], rel=1e-9)


def test_a_model_draws_the_judged_images(toy: None, checkpoint: Path, tmp_path: Path) -> None:
    reference = tmp_path / "b.npz"
    np.savez(reference, arr_0=pictures(12, seed=1, size=16))
    words = ["eval", "fid", f"model:{checkpoint}", str(reference), "--features", "toy", "--num", "6", "--device", "cpu"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "--out" in refused.output
    printed = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run"), "--json"])
    assert printed.exit_code == 0, printed.output
    assert json.loads(printed.stdout)["n_a"] == 6
    assert len(list((tmp_path / "run" / "images").rglob("*.png"))) == 6


def test_published_numbers_stand_beside_ones_own() -> None:
    rows = comparison("imagenet256", 2.0, lower_is_better=True)
    values = [float(value) for _, value, _, _ in rows]
    assert values == sorted(values)
    assert ("this run", "2.00", "", "") in rows
    with pytest.raises(ConfigError, match="imagenet512"):
        comparison("cifar10", 2.0, lower_is_better=True)


TWO = """
import sys
import numpy as np
import torch
from eval import features, fid
from eval.processes import joined

def build(path, device):
    def taps(images):
        x = images.float().flatten(1)[:, :192:24] / 255
        return {"features": x, "spatial": x[:, :3].square(), "logits": 4 * x[:, :5]}
    return features.FeatureNetwork(name="toy", sha256="", dim=8, encode=lambda x: taps(x)["features"], encode_taps=taps)

features.NETWORKS["toy"] = build
with joined() as (rank, world):
    result = fid.compare(sys.argv[1], sys.argv[2], features="toy", measures=fid.MEASURES, batch_size=4)
if rank == 0:
    import dataclasses, json
    print(json.dumps(dataclasses.asdict(result)))
"""


def test_r27_two_processes_give_the_numbers_of_one(toy: None, tmp_path: Path, repository: Path) -> None:
    for name, rows in (("a", pictures(21)), ("b", pictures(26, seed=1))):
        np.savez(tmp_path / f"{name}.npz", arr_0=rows)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    words = [sys.executable, "-c", TWO, str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]
    running = [
        subprocess.Popen(
            words, cwd=repository, env={**common, "RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for r in range(2)
    ]
    outputs = [p.communicate(timeout=120) for p in running]
    assert [p.returncode for p in running] == [0, 0], outputs[0][1].decode()[-2000:]
    found = json.loads(outputs[0][0])
    alone = fid.compare(tmp_path / "a.npz", tmp_path / "b.npz", features="toy", measures=fid.MEASURES)
    for name in ("fid", "sfid", "kid_mean", "isc_mean", "precision", "recall", "density", "coverage", "cmmd"):
        assert found[name] == pytest.approx(getattr(alone, name), rel=1e-9), name
