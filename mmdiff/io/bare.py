"""Published weight files that come without a config.json: what network they are, read off names and shapes.

What shapes cannot tell (numbers of attention heads) is known for the published widths only. A file of another width
needs a config.json beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from mmdiff.errors import CheckpointError
from mmdiff.io.published_stability import guess_stability
from mmdiff.io.tensors import TensorInfo

__all__ = ["GUESSED", "guess"]

Info = Mapping[str, TensorInfo]

_EMIGM_HEADS = {448: 8, 512: 8, 768: 12, 1024: 16, 1280: 16}


def guess(info: Info) -> dict[str, Any] | None:
    """What a config.json would say.

    Args:
        info: Names and shapes of the tensors.

    Returns:
        The options under their published names; None if the tensors are of no published network.

    Raises:
        CheckpointError: The network is known but not of a published width.
    """
    found = next((read for mark, read in GUESSED.values() if mark in info), None)
    return None if found is None else found(info)


def _emigm(info: Info) -> dict[str, Any]:
    slots, encoder = info["encoder_pos_embed_learned"].shape[1:]
    tokens, decoder = info["diffusion_pos_embed_learned"].shape[1:]
    channels = info["z_proj.weight"].shape[1]
    tied = len(info["mask_token"].shape) == 2
    head = "diffloss.net."
    return {
        "img_size": math.isqrt(tokens) * 16,
        "vae_stride": 16,
        "vae_embed_dim": channels,
        "patch_size": 1,
        "class_num": info["class_emb.weight"].shape[0],
        "encoder_embed_dim": encoder,
        "encoder_depth": _depth(info, "encoder_blocks."),
        "encoder_num_heads": _heads(_EMIGM_HEADS, encoder, "encoder_num_heads"),
        "decoder_embed_dim": decoder,
        "decoder_depth": _depth(info, "decoder_blocks."),
        "decoder_num_heads": _heads(_EMIGM_HEADS, decoder, "decoder_num_heads"),
        "buffer_size": slots - tokens,
        "diffloss_d": _depth(info, f"{head}res_blocks."),
        "diffloss_w": info[f"{head}input_proj.weight"].shape[0],
        "use_unsup_cfg": tied,
        "use_mae": True,
    }


def _maskgit_v1(info: Info) -> dict[str, Any]:
    width = info["tok_emb.weight"].shape[1]
    return {
        "input_size": math.isqrt(info["pos_emb"].shape[1] - 1),
        "hidden_dim": width,
        # One table holds codes, the mask, classes and no class; all published networks have ImageNet's classes.
        "codebook_size": info["tok_emb.weight"].shape[0] - 2 - _CLASSES,
        "nclass": _CLASSES,
        "depth": _depth(info, "transformer.layers."),
        "heads": _heads({768: 16}, width, "heads"),
        "mlp_dim": info["transformer.layers.0.1.fn.net.0.weight"].shape[0],
    }


def _maskgit_v2(info: Info) -> dict[str, Any]:
    width = info["tok_emb.weight"].shape[1]
    return {
        "input_size": math.isqrt(info["pos_emb.weight"].shape[0]),
        "hidden_dim": width,
        "codebook_size": info["tok_emb.weight"].shape[0] - 1,
        "nclass": info["cls_emb.weight"].shape[0] - 1,
        "depth": _depth(info, "transformer.layers."),
        "heads": _heads({384: 6, 768: 12, 1024: 16, 1152: 16}, width, "heads"),
        "mlp_dim": 4 * width,
        "register": info["reg_tokens.weight"].shape[0] if "reg_tokens.weight" in info else 0,
        "proj": 1,
    }


def _convolutional(info: Info, prefix: str) -> dict[str, Any]:
    base = info["encoder.conv_in.weight"].shape[0]
    levels, block = _depth(info, prefix), "block" if prefix.endswith("down.") else "res"
    widths = [info[f"{prefix}{i}.{block}.0.conv1.weight"].shape[0] for i in range(levels)]
    blocks = _depth(info, f"{prefix}0.{block}.")
    return {"ch": base, "ch_mult": [w // base for w in widths], "num_res_blocks": blocks}


def _kl(info: Info) -> dict[str, Any]:
    return {**_convolutional(info, "encoder.down."), "embed_dim": info["post_quant_conv.weight"].shape[1]}


def _taming(info: Info) -> dict[str, Any]:
    codes, width = info["quantize.embedding.weight"].shape
    features = info["post_quant_conv.weight"].shape[0]
    tree = {"n_embed": codes, "embed_dim": width, "z_channels": features}
    return {**_convolutional(info, "encoder.down."), **tree}


def _llamagen(info: Info) -> dict[str, Any]:
    codes, width = info["quantize.embedding.weight"].shape
    features = info["post_quant_conv.weight"].shape[0]
    tree = {"n_embed": codes, "codebook_embed_dim": width, "z_channels": features}
    return {**_convolutional(info, "encoder.conv_blocks."), **tree}


def _magvit(info: Info) -> dict[str, Any]:
    bits = info["quantize.power_vals"].shape[0]

    def side(prefix: str, base: int) -> dict[str, Any]:
        levels = _depth(info, prefix)
        widths = [info[f"{prefix}{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        blocks = [_depth(info, f"{prefix}{i}.block.") for i in range(levels)]
        return {"ch": base, "ch_mult": [w // base for w in widths], "num_res_blocks": blocks, "z_channels": bits}

    first, last = info["encoder.conv_in.weight"].shape[0], info["decoder.conv_out.weight"].shape[1]
    return {
        "_class_name": "MAGVITv2",
        "encoder": side("encoder.down.", first),
        "decoder": side("decoder.up.", last),
    }


_CLASSES = 1000

GUESSED: dict[str, tuple[str, Callable[[Info], dict[str, Any]]]] = {
    "Stable Diffusion 3": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", guess_stability),
    "Stable Diffusion 3's network": ("joint_blocks.0.x_block.attn.qkv.weight", guess_stability),
    "eMIGM and MAR": ("diffusion_pos_embed_learned", _emigm),
    "MaskGIT-pytorch": ("first_layer.0.weight", _maskgit_v1),
    "Halton-MaskGIT": ("last_norm.norm_final.weight", _maskgit_v2),
    "LlamaGen's tokenizer": ("encoder.conv_blocks.0.res.0.conv1.weight", _llamagen),
    "MAGVIT-v2": ("quantize.power_vals", _magvit),
    "VQGAN": ("quantize.embedding.weight", _taming),
    "KL-16": ("encoder.down.0.block.0.conv1.weight", _kl),
}
"""Network -> (a key that none of those after it has, how to read its options)."""


def _depth(info: Info, prefix: str) -> int:
    """One more than the largest number after ``prefix``."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    return 1 + max((int(m[1]) for m in map(pattern.match, info) if m), default=-1)


def _heads(known: Mapping[int, int], width: int, option: str) -> int:
    if width not in known:
        raise CheckpointError(
            f"the tensors do not tell the number of attention heads, and width {width} is not a published one "
            f"({', '.join(map(str, known))}); write a config.json with {option} beside the file"
        )
    return known[width]
