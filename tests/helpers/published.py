"""Small checkpoints in the published layouts: key names and config fields written down here, not taken from mmdiff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers import image_layouts
from tests.helpers import published_diffusion as diffusion

Shapes = dict[str, tuple[int, ...]]

OLMO: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "attention_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 24,
    "embedding_size": 64,
    "eos_token_id": 61,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 60,
    "max_sequence_length": 32,
    "mlp_hidden_size": 40,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "pad_token_id": 61,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 64,
    "weight_tying": False,
}

LLAMA: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "attention_bias": False,
    "eos_token_id": 61,
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 40,
    "mask_token_id": 60,
    "max_position_embeddings": 32,
    "model_type": "llada",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 64,
}

LLADA_V: dict[str, Any] = {
    **LLAMA,
    "architectures": ["LlavaLLaDAModelLM"],
    "bos_token_id": 128000,
    "model_type": "llava_llada",
    "mm_hidden_size": 12,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_tower": "somewhere/siglip-tiny",
    "vision_config": {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 12,
        "image_size": 20,
        "intermediate_size": 28,
        "layer_norm_eps": 1e-6,
        "num_attention_heads": 3,
        "num_channels": 3,
        "num_hidden_layers": 3,
        "patch_size": 6,
    },
}

MMADA: dict[str, Any] = {
    **OLMO,
    "architectures": ["MMadaModelLM"],
    "model_type": "mmada",
    "embedding_size": 84,
    "vocab_size": 84,
    "llm_vocab_size": 64,
    "codebook_size": 16,
    "num_vq_tokens": 4,
    "num_new_special_tokens": 0,
    "new_vocab_size": 84,
    "code_offset": 62,
    "max_text_length": 6,
    "reserved_token_mapping": {
        "<|startoftext|>": 40, "<|endoftext|>": 61, "<|end_header_id|>": 41, "<|soi|>": 42, "<|eoi|>": 43,
        "<|t2i|>": 44, "<|mmu|>": 45, "[iPAD]": 46, "<|r2i|>": 47,
    },
}  # fmt: skip

LUMINA: dict[str, Any] = {
    **OLMO,
    "model_type": "lumina_dimoo",
    "embedding_size": 84,
    "vocab_size": 84,
    "code_offset": 62,
    "codebook_size": 16,
    "image_grid": 2,
    "special_ids": {"newline": 40, "boi": 41, "eoi": 42, "uncondition": 43, "boa": 44, "eoa": 45},
}

AMUSED: dict[str, Any] = {
    "_class_name": "VQModel",
    "act_fn": "silu",
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "lookup_from_codebook": True,
    "mid_block_add_attention": False,
    "norm_num_groups": 32,
    "num_vq_embeddings": 16,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
}

EMIGM: dict[str, Any] = {
    "img_size": 64,
    "vae_stride": 16,
    "vae_embed_dim": 3,
    "patch_size": 2,
    "class_num": 5,
    "encoder_embed_dim": 12,
    "encoder_depth": 2,
    "encoder_num_heads": 3,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "buffer_size": 3,
    "diffloss_d": 2,
    "diffloss_w": 10,
}
"""MAR's options: encoder and decoder of different widths, no class and mask apart."""

MASKGIT_V1: dict[str, Any] = {
    "input_size": 2,
    "hidden_dim": 12,
    "codebook_size": 60,
    "depth": 2,
    "heads": 3,
    "mlp_dim": 20,
    "nclass": 4,
}

MASKGIT_V2: dict[str, Any] = {**MASKGIT_V1, "register": 1, "proj": 1}

KL16: dict[str, Any] = {"ch": 32, "ch_mult": [1, 2], "embed_dim": 3, "num_res_blocks": 1}

TAMING: dict[str, Any] = {"ch": 32, "ch_mult": [1, 1], "n_embed": 7, "embed_dim": 3, "z_channels": 5}

LLAMAGEN: dict[str, Any] = {"ch": 32, "ch_mult": [1, 1], "n_embed": 7, "z_channels": 5}

MAGVIT: dict[str, Any] = {
    "_class_name": "MAGVITv2",
    "encoder": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": [2, 1], "z_channels": 3},
    "decoder": {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": [1, 2], "z_channels": 3},
    "resolution": 8,
}

DC_AE: dict[str, Any] = {
    "_class_name": "AutoencoderDC",
    "in_channels": 3,
    "latent_channels": 2,
    "attention_head_dim": 4,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "encoder_layers_per_block": [1, 1],
    "decoder_layers_per_block": [1, 1],
    "encoder_qkv_multiscales": [[], []],
    "decoder_qkv_multiscales": [[], []],
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
    "scaling_factor": 0.5,
}
SIGLIP: dict[str, Any] = {**LLADA_V["vision_config"], "model_type": "siglip_vision_model"}

CONFIGS = {
    "olmo": OLMO,
    "llama": LLAMA,
    "llada-v": LLADA_V,
    "mmada": MMADA,
    "lumina": LUMINA,
    "emigm": EMIGM,
    "maskgit-v1": MASKGIT_V1,
    "maskgit-v2": MASKGIT_V2,
    "kl16": KL16,
    "dc-ae": DC_AE,
    "taming": TAMING,
    "llamagen": LLAMAGEN,
    "magvit-v2": MAGVIT,
    "amused-vq": AMUSED,
    "siglip": SIGLIP,
    "dit": diffusion.DIT,
    "sd3": diffusion.SD3,
    "dit-diffusers": diffusion.DIFFUSERS_DIT,
    "sd3-single": diffusion.SD3_SINGLE,
    "meissonic": diffusion.MUDDIT,
}

DIFFUSION = {
    "dit": diffusion.dit_shapes,
    "sd3": diffusion.sd3_shapes,
    "dit-diffusers": diffusion.diffusers_dit_shapes,
    "sd3-single": diffusion.sd3_single_shapes,
    "meissonic": diffusion.muddit_shapes,
}


def shapes(layout: str, tree: dict[str, Any]) -> Shapes:
    """Every published key of a layout with its shape."""
    if layout in DIFFUSION:
        return DIFFUSION[layout](tree)
    if layout in ("olmo", "mmada", "lumina"):
        return olmo_shapes(tree)
    if layout in image_layouts.SHAPES:
        return image_layouts.SHAPES[layout](tree)
    if layout == "siglip":
        return tower_shapes("vision_model", tree)
    return llama_shapes(tree) | (vision_shapes(tree) if layout == "llada-v" else {})


def olmo_shapes(c: dict[str, Any]) -> Shapes:
    d, f, v = c["d_model"], c["mlp_hidden_size"], c["embedding_size"]
    kv = d // c["n_heads"] * c["n_kv_heads"]
    block = {
        "attn_norm": (d,),
        "q_proj": (d, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "attn_out": (d, d),
        "ff_norm": (d,),
        "ff_proj": (f, d),
        "up_proj": (f, d),
        "ff_out": (d, f),
    }
    out: Shapes = {"model.transformer.wte.weight": (v, d), "model.transformer.ln_f.weight": (d,)}
    for i in range(c["n_layers"]):
        out |= {f"model.transformer.blocks.{i}.{name}.weight": shape for name, shape in block.items()}
    return out if c["weight_tying"] else out | {"model.transformer.ff_out.weight": (v, d)}


def llama_shapes(c: dict[str, Any]) -> Shapes:
    d, f, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    kv = d // c["num_attention_heads"] * c["num_key_value_heads"]
    block = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    out: Shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    for i in range(c["num_hidden_layers"]):
        out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return out if c["tie_word_embeddings"] else out | {"lm_head.weight": (v, d)}


def vision_shapes(c: dict[str, Any]) -> Shapes:
    d = c["hidden_size"]
    t = c.get("vision_config") or SO400M
    out: Shapes = {
        "model.image_newline": (d,),
        "model.mm_projector.0.weight": (d, t["hidden_size"]),
        "model.mm_projector.0.bias": (d,),
        "model.mm_projector.2.weight": (d, d),
        "model.mm_projector.2.bias": (d,),
    }
    return out | tower_shapes("model.vision_tower.vision_tower.vision_model", t)


def tower_shapes(top: str, t: dict[str, Any]) -> Shapes:
    w, f, p = t["hidden_size"], t["intermediate_size"], t["patch_size"]
    out: Shapes = {
        f"{top}.embeddings.patch_embedding.weight": (w, 3, p, p),
        f"{top}.embeddings.patch_embedding.bias": (w,),
        f"{top}.embeddings.position_embedding.weight": ((t["image_size"] // p) ** 2, w),
        f"{top}.post_layernorm.weight": (w,),
        f"{top}.post_layernorm.bias": (w,),
    }
    for i in range(t["num_hidden_layers"] - 1):
        layer = f"{top}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= {f"{layer}.self_attn.{name}.weight": (w, w), f"{layer}.self_attn.{name}.bias": (w,)}
        for name in ("layer_norm1", "layer_norm2"):
            out |= {f"{layer}.{name}.weight": (w,), f"{layer}.{name}.bias": (w,)}
        out |= {f"{layer}.mlp.fc1.weight": (f, w), f"{layer}.mlp.fc1.bias": (f,)}
        out |= {f"{layer}.mlp.fc2.weight": (w, f), f"{layer}.mlp.fc2.bias": (w,)}
    return out


SO400M = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}


def weights(layout: str, tree: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights, in bfloat16, float16 and float32 by turns, so that a change of dtype shows."""
    draw = torch.Generator().manual_seed(seed)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    tensors = {
        # What is stacked elsewhere has one dtype.
        key: (torch.randn(shape, generator=draw) * 0.2).to(
            dtypes[2 if ".to_" in key and layout[:3] == "dit" else n % 3]
        )
        for n, (key, shape) in enumerate(shapes(layout, tree).items())
    }
    first = "transformer_blocks.0.norm1.emb."
    for key in tensors if layout == "dit-diffusers" else ():
        if ".norm1.emb." in key and not key.startswith(first):
            tensors[key] = tensors[first + key.partition(".emb.")[2]].clone()
    if layout == "maskgit-v2":
        tensors["head.weight"] = tensors["tok_emb.weight"].clone()
    return tensors


def publish(folder: Path, layout: str, tree: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Write a published folder; returns its tensors."""
    tree = CONFIGS[layout] if tree is None else tree
    tensors = weights(layout, tree)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors
