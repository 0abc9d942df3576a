"""Options and fixtures for the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    # `--fixtures DIR` takes the word from pytest's own listing of fixtures, which stays reachable as --funcargs.
    parser.optparser.conflict_handler = "resolve"
    group = parser.getgroup("golden", "golden tests")
    parser.optparser.conflict_handler = "error"
    default = HERE / "fixtures"
    group.addoption("--fixtures", dest="golden", type=Path, default=default, help="root folder of the golden data")


@pytest.fixture(scope="session")
def fixtures(request: pytest.FixtureRequest) -> Path:
    """Root folder of the golden fixtures, given by ``pytest tests/golden --fixtures DIR``."""
    return request.config.getoption("golden").resolve()


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root folder of the source tree."""
    return HERE.parent
