"""Checkpoints, tiny and random, that answer something different about every picture."""

from __future__ import annotations

import dataclasses

import torch
from PIL import Image

from mmdiff import rng
from mmdiff.images import Tiling
from mmdiff.models import llada, llada_v, unified, vision, vq
from mmdiff.pipelines import Checkpoint
from mmdiff.text import Tokenizer

TEXTS = ["a red circle", "the blue square is small", "how many dogs are there?", "yes", "no", "a cat sat on the mat"]
CLASSES = ("circle", "square", "cat")


def llada_v_checkpoint() -> Checkpoint:
    tokenizer = Tokenizer.train(TEXTS, 320)
    config = llada_v.Config(
        language=dataclasses.replace(language(tokenizer), max_length=300),
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


def language(tokenizer: Tokenizer) -> llada.Config:
    return llada.Config(
        vocab_size=tokenizer.vocab_size,
        width=32,
        depth=2,
        heads=4,
        kv_heads=2,
        ffn_width=64,
        max_length=256,
        rope_theta=10000.0,
        mask_id=tokenizer.mask_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        eot_id=tokenizer.eot_id,
    )


def unified_checkpoint() -> Checkpoint:
    tokenizer = Tokenizer.train(TEXTS, 320)
    tower = vision.Config(image_size=16, patch_size=8, width=16, depth=1, heads=2, ffn_width=32)
    codes = vq.VQ(vq.Config(image_size=16, widths=(8, 8), blocks=0, levels=(5, 4)), generator=rng.generator(1))
    shape = unified.Config(
        language=language(tokenizer),
        vision=tower,
        codes=unified.CodesConfig(codebook=codes.codebook, grid=codes.grid),
    )
    model = unified.Unified(shape, generator=rng.generator(0))
    with torch.no_grad():  # larger steps than at initialisation: decisions far from ties, and pictures that matter
        model.language.embed_tokens.weight *= 0.3
        model.language.lm_head.weight *= 4
        model.codes.head.weight *= 6
    defaults = {"text": {"gen_length": 8}, "image": {"num_inference_steps": 5}}
    return Checkpoint(model.eval(), tokenizer, codes.eval(), CLASSES, defaults)
