"""Small shards that the tests of this room share."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.pack import write_shards
from mmdiff.batch import Layout
from mmdiff.text import Tokenizer

SIDE = 16


def png(number: int, side: int = SIDE) -> bytes:
    """A flat image whose colour tells its number."""
    stream = io.BytesIO()
    color = (number % 256, number // 256 % 256, 77)
    Image.fromarray(np.full((side, side, 3), color, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def npy(codes: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, codes)
    return stream.getvalue()


def members(number: int, **fields: Any) -> dict[str, bytes]:
    info = {
        "caption": f"thing {number}",
        "captions": [f"a thing called {number}", f"number {number}"],
        "concept": f"c{number % 5}",
        "qa": [["What is it?", "thing", "what"], ["Is it red?", "no", "yes-no"], ["Is it big?", "yes", "yes-no"]],
    }
    codes = np.arange(16, dtype=np.int16).reshape(4, 4) + number % 8
    return {"png": png(number), "json": json.dumps({**info, **fields}).encode(), "codes.npy": npy(codes)}


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., list[Path]]:
    """Write ``count`` samples with keys ``v1.5_00000``, ...; returns the shards."""

    def make(count: int, per_shard: int = 20, folder: str = "shards", **fields: Any) -> list[Path]:
        rows = ((f"v1.5_{i:05d}", members(i, **fields)) for i in range(count))
        return write_shards(rows, tmp_path / folder, "s", per_shard)

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A tokenizer of about 320 ids."""
    texts = ["thing 1", "a thing called 2", "What is it?", "Is it red?", "yes", "no", "Describe this image."]
    return Tokenizer.train(texts * 5, 320)


@pytest.fixture(scope="session")
def layout(tokenizer: Tokenizer) -> Layout:
    """A small model's layout: 4 features, 16 codes."""
    return Layout(vocab_size=tokenizer.vocab_size, features=4, image_size=SIDE, codes=16, codebook=32)
