"""What most golden tests read: a fixture's ``config.json``, inputs and outputs, and one test per output.

A module says which fixture is its own in ``NAME``; one that reads or parametrises otherwise has its own functions of
these names.
"""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.golden import root_of, tree_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = getattr(metafunc.module, "NAME", None)
    if name is None or hasattr(metafunc.module, "pytest_generate_tests"):
        return
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(root_of(metafunc.config, name) / "outputs.safetensors")))
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(tree_of(metafunc.config, name)["cases"]))


@pytest.fixture(scope="module")
def tree(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The fixture's ``config.json``."""
    return tree_of(request.config, request.module.NAME)


@pytest.fixture(scope="module")
def inputs(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """What the reference was given."""
    return load_file(root_of(request.config, request.module.NAME) / "inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """What the reference gave."""
    return load_file(root_of(request.config, request.module.NAME) / "outputs.safetensors")
