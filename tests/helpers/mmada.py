"""A tiny MMaDA in its published layout, with MAGVIT-v2 beside it, that answers something else about every picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmdiff.text import Tokenizer
from tests.helpers import image_layouts, published
from tests.helpers.tiny import TEXTS

MAGVIT: dict[str, Any] = {
    "_class_name": "MAGVITv2",
    **{
        side: {"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": [1, 1, 1], "z_channels": 5}
        for side in ("encoder", "decoder")
    },
    "resolution": 16,
}
RESERVED = ("<|soi|>", "<|eoi|>", "<|t2i|>", "<|mmu|>", "[iPAD]", "<|r2i|>")


def publish(folder: Path, *, image_tokenizer: bool = True) -> Path:
    """Write the folder; codes begin behind the tokenizer, rows are padded as published ones are."""
    tokenizer = Tokenizer.train(TEXTS, 320)
    tokenizer.save_pretrained(folder)
    offset = tokenizer.vocab_size
    spare = {spelling: offset - 1 - n for n, spelling in enumerate(RESERVED)}
    rows = offset + 32 + 8
    tree = {
        **published.MMADA,
        **{
            "d_model": 32,
            "mlp_hidden_size": 64,
            "max_sequence_length": 128,
            "vocab_size": rows,
            "new_vocab_size": rows,
        },
        **{"embedding_size": rows, "llm_vocab_size": offset, "codebook_size": 32, "num_vq_tokens": 16},
        **{"code_offset": offset, "max_text_length": 12, "reserved_token_mapping": spare},
        **{"mask_token_id": tokenizer.mask_id, "eos_token_id": tokenizer.eos_id},
    }
    draw = torch.Generator().manual_seed(0)
    shapes = published.shapes("mmada", tree)
    tensors = {
        k: 1 + 0.1 * torch.randn(s, generator=draw) if len(s) == 1 else torch.randn(s, generator=draw) * s[-1] ** -0.5
        for k, s in shapes.items()
    }
    tensors["model.transformer.ff_out.weight"] *= 6  # decisions far from ties
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tree))
    if image_tokenizer:
        publish_magvit(folder / "image_tokenizer")
    return folder


def publish_magvit(folder: Path) -> Path:
    """Write MAGVIT-v2's folder."""
    folder.mkdir(parents=True)
    draw, bits = torch.Generator().manual_seed(1), MAGVIT["encoder"]["z_channels"]
    shapes = image_layouts.magvit_shapes(MAGVIT)
    tensors = {k: torch.randn(s, generator=draw) * 0.2 for k, s in shapes.items() if not k.startswith("quantize")}
    powers = torch.tensor([2**i for i in reversed(range(bits))])
    tensors["quantize.power_vals"] = powers
    tensors["quantize.embedding"] = torch.tensor(
        [[1.0 if c // p % 2 else -1.0 for p in powers] for c in range(2**bits)]
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(MAGVIT))
    return folder
