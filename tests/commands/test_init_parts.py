"""Starting a part of a model from another checkpoint."""

from __future__ import annotations

import pytest
import torch

from mmdiff import rng
from mmdiff.commands.run_parts import _init_part, model_of
from mmdiff.errors import ConfigError
from mmdiff.models import llada, scorer, unified, vision

TOWER = vision.Config(image_size=16, patch_size=8, width=24, depth=1, heads=2, ffn_width=32, post_norm=True)
LANGUAGE = llada.Config(
    vocab_size=37, width=16, depth=1, heads=2, kv_heads=2, ffn_width=16, mask_id=3, bos_id=0, eos_id=1, eot_id=2
)
SHAPE = unified.Config(language=LANGUAGE, vision=TOWER, codes=unified.CodesConfig(codebook=6, grid=2))


def judge(tower: vision.Config = TOWER) -> scorer.Scorer:
    config = scorer.Config(vocab_size=9, image_size=16, tower=tower, width=8)
    return scorer.Scorer(config, generator=rng.generator(1, "init"))


def test_a_recipe_takes_the_named_part_and_leaves_the_others(tmp_path) -> None:
    from mmdiff import config
    from mmdiff.commands.recipe import RunConfig

    other = judge()
    other.save_pretrained(tmp_path / "judge")
    tree = {
        "model": config.to_dict(SHAPE),
        "init_parts": {"vision": str(tmp_path / "judge")},
        "data": {"batch_size": 2, "sources": [{"shards": ["embedded:emoji/train"], "tasks": [{"type": "image"}]}]},
        "objective": {"type": "masked"},
        "train": {"samples": 2},
        "out": str(tmp_path / "run"),
    }
    model = model_of(config.load(RunConfig, tree))
    for key, value in other.vision.state_dict().items():
        assert torch.equal(model.vision.state_dict()[key], value), key
    fresh = unified.Unified(SHAPE, generator=rng.generator(0, "init"))
    assert torch.equal(model.language.embed_tokens.weight, fresh.language.embed_tokens.weight)


def test_unknown_parts_and_other_shapes_are_refused_by_name() -> None:
    model = unified.Unified(SHAPE)
    with pytest.raises(ConfigError, match=r"no part 'eyes'; it has vision"):
        _init_part(model, "eyes", "judge", judge())
    wide = vision.Config(image_size=16, patch_size=8, width=32, depth=1, heads=2, ffn_width=32)
    with pytest.raises(ConfigError, match="does not fit part 'vision'"):
        _init_part(model, "vision", "judge", judge(wide))
