"""A tiny checkpoint on disk that answers and draws, for harnesses that need a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdiff import rng
from mmdiff.models import llada, unified, vision, vq
from mmdiff.pipelines import Checkpoint, Pipeline
from mmdiff.text import Tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights, read through the public interface."""
    t = Tokenizer.train(["a red circle", "a cat", "square A B C D", "(A) (B) Answer the question"], 300)
    ids = {"mask_id": t.mask_id, "bos_id": t.bos_id, "eos_id": t.eos_id, "eot_id": t.eot_id}
    language = llada.Config(vocab_size=t.vocab_size, width=32, depth=1, heads=2, kv_heads=2, ffn_width=64, **ids)
    tower = vision.Config(image_size=16, patch_size=8, width=16, depth=1, heads=2, ffn_width=32)
    codes = vq.VQ(vq.Config(image_size=16, widths=(8, 8), blocks=0, levels=(5, 4)), generator=rng.generator(1))
    shape = unified.Config(
        language=language, vision=tower, codes=unified.CodesConfig(codebook=codes.codebook, grid=codes.grid)
    )
    model = unified.Unified(shape, generator=rng.generator(0))
    defaults = {"text": {"gen_length": 4}, "image": {"num_inference_steps": 2}}
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    Pipeline(Checkpoint(model, t, codes, ("circle", "cat"), defaults)).save_pretrained(path)
    return path
