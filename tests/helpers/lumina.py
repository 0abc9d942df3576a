"""A tiny Lumina-DiMOO in its published layout, with aMUSEd's tokenizer beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmdiff.text import Tokenizer
from tests.helpers import image_layouts, published
from tests.helpers.tiny import TEXTS

AMUSED: dict[str, Any] = {**published.AMUSED, "num_vq_embeddings": 32, "block_out_channels": [32, 32, 32]}
AMUSED |= {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
IDS = ("newline", "boi", "eoi", "uncondition", "boa", "eoa")


def publish(folder: Path) -> Path:
    """Write the folder; the ids that frame images are the last of the tokenizer."""
    tokenizer = Tokenizer.train(TEXTS, 320)
    tokenizer.save_pretrained(folder)
    offset = tokenizer.vocab_size
    tree = {
        **published.LUMINA,
        **{"d_model": 32, "mlp_hidden_size": 64, "max_sequence_length": 600, "vocab_size": offset + 32},
        **{"embedding_size": offset + 32, "codebook_size": 32, "code_offset": offset, "image_grid": 4},
        **{"special_ids": {name: offset - 1 - n for n, name in enumerate(IDS)}},
        **{"mask_token_id": tokenizer.mask_id, "eos_token_id": tokenizer.eos_id},
    }
    draw = torch.Generator().manual_seed(0)
    tensors = {
        k: 1 + 0.1 * torch.randn(s, generator=draw) if len(s) == 1 else torch.randn(s, generator=draw) * s[-1] ** -0.5
        for k, s in published.shapes("lumina", tree).items()
    }
    tensors["model.transformer.ff_out.weight"] *= 6  # decisions far from ties
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tree))
    publish_amused(folder / "image_tokenizer")
    return folder


def publish_amused(folder: Path) -> Path:
    """Write the tokenizer's folder as diffusers does."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(1)
    tensors = {k: torch.randn(s, generator=draw) * 0.3 for k, s in image_layouts.amused_shapes(AMUSED).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(AMUSED))
    return folder
