"""A LLaDA-V with tiles, tiny and random, that answers something different about every picture."""

from __future__ import annotations

import torch
from PIL import Image

from mmdiff import rng
from mmdiff.images import Tiling
from mmdiff.models import llada, llada_v, vision
from mmdiff.pipelines import Checkpoint
from mmdiff.text import Tokenizer

TEXTS = ["a red circle", "the blue square is small", "how many dogs are there?", "yes", "no", "be brief"]


def llada_v_checkpoint() -> Checkpoint:
    tokenizer = Tokenizer.train(TEXTS, 320)
    ids = {name: getattr(tokenizer, name) for name in ("mask_id", "bos_id", "eos_id", "eot_id")}
    config = llada_v.Config(
        language=llada.Config(
            vocab_size=tokenizer.vocab_size,
            width=32,
            depth=2,
            heads=4,
            kv_heads=2,
            ffn_width=64,
            max_length=300,
            rope_theta=10000.0,
            **ids,
        ),
        vision=vision.Config(image_size=16, patch_size=8, width=16, depth=1, heads=2, ffn_width=32),
        tiling=Tiling(limit=4),
        system="be brief",
    )
    model = llada_v.LLaDAV(config, generator=rng.generator(0))
    with torch.no_grad():  # decisions far from ties, and pictures that matter
        model.language.lm_head.weight *= 8
        model.connector[2].weight *= 4
    return Checkpoint(model.eval(), tokenizer, defaults={"text": {"gen_length": 8}})


def picture(seed: int, width: int = 20, height: int = 12) -> Image.Image:
    draw = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 2, (2, 3, 3), generator=draw, dtype=torch.uint8) * 255
    return Image.fromarray(data.numpy()).resize((width, height), Image.Resampling.NEAREST)
