"""The toy run of tests/helpers as a fixture."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module tests/helpers/toy_training.py."""
    path = Path(__file__).parents[1] / "helpers" / "toy_training.py"
    spec = importlib.util.spec_from_file_location("toy_training", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_training"] = module
    spec.loader.exec_module(module)
    return module
