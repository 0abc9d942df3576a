"""Every recipe that is shipped can be read, and builds the network whose numbers it quotes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdiff import config
from mmdiff.models import emigm, maskgit, registry

ROOT = Path(__file__).parents[2] / "configs"
RECIPES = sorted(ROOT.rglob("*.yaml"))
PUBLISHED = {
    **{f"emigm/{name.replace('-', '_')}.yaml": shape for name, shape in emigm.SIZES.items()},
    "maskgit/bert_256.yaml": maskgit.SIZES["bert-256"],
    "maskgit/halton_384.yaml": maskgit.SIZES["halton-large-384"],
}


def read(path: Path):
    from mmdiff.commands.recipe import RunConfig

    return config.load(RunConfig, path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_is_a_valid_run_and_its_network_can_be_built(path):
    spec = read(path)
    if spec.model is not None:
        assert sum(p.numel() for p in registry.build(spec.model, device="meta").parameters()) > 0
    head = path.read_text("utf-8").splitlines()[:12]
    assert head[0].startswith("# ")
    assert any("mmdiff " in line and str(path.relative_to(ROOT)) in line for line in head)
    assert any("hardware" in line for line in head)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_published_shape(name):
    assert read(ROOT / name).model == PUBLISHED[name]


def test_every_recipe_of_a_published_size_is_compared():
    paths = [path for folder in ("emigm", "maskgit") for path in (ROOT / folder).glob("*_[0-9][0-9][0-9].yaml")]
    assert {str(path.relative_to(ROOT)) for path in paths} == set(PUBLISHED)
